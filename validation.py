"""How good is a checkpoint? Closed-set accuracy on the held-out pictures.

    sh validation.sh                                                    # the training output, all GPUs
    sh validation.sh --model_name_or_path model                         # the untuned model, for comparison
    python validation.py --model_name_or_path sft-llava-1.6-7b/checkpoint-100 --per_device_eval_batch_size 4

Leaves <report_dir>/<checkpoint name>/report.json and predictions.csv; prints a table, and as the last line of
stdout one JSON object. Nothing is generated: the ten labels are scored in one forward pass a batch (see Scorer), so
every picture gets ten probabilities and an answer that is always one of the labels.
"""

import csv
import json
import math
import os
import sys
import time

import config as settings
from checkpoint import base_of, load_model, load_processor, require_checkpoint
from config import UserError
from data_process_utils import PictureError, load_picture, load_split, prepare


class Scorer:
    """Log-probabilities of all labels for a batch of pictures, in one forward pass.

    The answers ride behind the prompt in one sequence, each seeing the prompt and itself only (4-D attention mask),
    with positions that restart at the prompt's end. What a label scores is what teacher forcing gives it alone: the
    sum of log p over its answer tokens and </s>, tokenised within the whole conversation. Answers are left of
    nothing and prompts are padded on the left, so the same columns hold them in every row of a batch.
    """

    def __init__(self, processor, config):
        """Tokenises the prompt and all answers. Raises UserError if two have the same tokens or one has none."""
        import torch

        self.processor, self.labels = processor, config.labels
        self.conversation = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": config.question}]}
        ]
        prompt = self._token_ids()
        answers = []  # per label: token ids, </s> last
        for label in self.labels:
            tokens = self._token_ids(config.answer_for(label))
            if tokens[: len(prompt)] != prompt or len(tokens) < len(prompt) + 2:
                raise UserError(f"label {label!r}: its tokens do not follow the prompt's; change --answer or --prompt")
            answers.append(tokens[len(prompt) :])
        if len({tuple(answer) for answer in answers}) < len(answers):
            raise UserError(f"labels {self.labels}: two of them have the same answer tokens; change --answer")
        self.answers = answers
        # </s> is predicted but never fed. Each fed token: its id, its label, its place in the answer.
        fed = [(t, k, i) for k, answer in enumerate(answers) for i, t in enumerate(answer[:-1])]
        self.fed_ids, self.fed_label, self.fed_place = torch.tensor(fed).T  # each [fed]
        # Each predicted token: its id, its label, and the kept logit that predicts it (0 is the prompt's last token).
        predicted, row = [], 0
        for k, answer in enumerate(answers):
            for i, token in enumerate(answer):
                predicted.append((token, k, row + i if i else 0))
            row += len(answer) - 1
        self.target_ids, self.target_label, self.target_row = torch.tensor(predicted).T  # each [predicted]

    def _token_ids(self, answer=None):
        messages = list(self.conversation)
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        text = self.processor.apply_chat_template(messages, chat_template=settings.CHAT_TEMPLATE, tokenize=False)
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    def collate(self, pictures):
        """RGB pictures -> model inputs on the CPU: prompts padded on the left, then the answers, mask and positions."""
        import torch

        question = self.conversation[0]["content"][1]
        messages = [
            [{"role": "user", "content": [{"type": "image", "image": picture}, question]}] for picture in pictures
        ]
        batch = self.processor.apply_chat_template(
            messages,
            chat_template=settings.CHAT_TEMPLATE,
            tokenize=True,
            return_dict=True,
            processor_kwargs={
                "padding": True,
                "padding_side": "left",
                "add_special_tokens": False,
                "return_tensors": "pt",
            },
        )
        seen = batch.pop("attention_mask").bool()  # [batch, prompt]
        size, prompt = seen.shape
        fed = len(self.fed_ids)
        batch["input_ids"] = torch.cat([batch["input_ids"], self.fed_ids.expand(size, fed)], dim=1)
        positions = (seen.cumsum(1) - 1).clamp(min=0)
        batch["position_ids"] = torch.cat([positions, seen.sum(1, keepdim=True) + self.fed_place], dim=1)
        mask = torch.ones(prompt + fed, prompt + fed, dtype=torch.bool).tril()  # causal
        mask[prompt:, prompt:] &= self.fed_label[:, None] == self.fed_label[None, :]  # no answer sees another
        mask = mask.repeat(size, 1, 1)
        mask[:, :, :prompt] &= seen[:, None, :]
        mask |= torch.eye(prompt + fed, dtype=torch.bool)  # a padding row sees itself: softmax of nothing is NaN
        batch["attention_mask"] = mask[:, None]  # [batch, 1, tokens, tokens]
        return batch

    def score(self, model, batch):
        """-> float32 [batch, labels] on the CPU, log-probabilities of the labels (not normalised over them).

        A batch that does not fit the GPU's memory is halved until it does, and that is said.
        """
        import torch

        size = len(batch["input_ids"])
        try:
            inputs = {key: value.to(model.device) for key, value in batch.items()}
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
            with torch.inference_mode():
                logits = model(**inputs, logits_to_keep=len(self.fed_ids) + 1, use_cache=False).logits
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            print(f"out of memory with {size} pictures at once: trying {(size + 1) // 2}", file=sys.stderr)
            parts = slice(size // 2), slice(size // 2, None)
            halves = [{key: value[part] for key, value in batch.items()} for part in parts]
            return torch.cat([self.score(model, half) for half in halves])
        log_p = logits.float().log_softmax(-1).cpu()[:, self.target_row, self.target_ids]  # [batch, predicted]
        return torch.zeros(size, len(self.labels)).index_add_(1, self.target_label, log_p)


def score_batches(model, scorer, pictures, batches, num_workers=0):
    """Yields (indices, log_p, errors) for each list of indices in `batches`, on this rank alone.

    pictures are paths; log_p is float32 [indices, labels], NaN in the row of a picture that cannot be read; errors
    maps such an index to the reason. A bar on rank 0's terminal.
    """
    import torch
    from accelerate import PartialState
    from tqdm import tqdm

    def collate(indices):
        opened, errors = {}, {}
        for i in indices:
            try:
                opened[i] = load_picture(pictures[i])
            except PictureError as error:
                errors[i] = str(error)
        return indices, list(opened), errors, scorer.collate(list(opened.values())) if opened else None

    loader = torch.utils.data.DataLoader(batches, batch_size=None, collate_fn=collate, num_workers=num_workers)
    quiet = not (PartialState().is_main_process and sys.stderr.isatty())
    with tqdm(total=sum(map(len, batches)), unit="image", disable=quiet) as bar:
        for indices, readable, errors, batch in loader:
            log_p = torch.full((len(indices), len(scorer.labels)), float("nan"))
            if readable:
                log_p[[indices.index(i) for i in readable]] = scorer.score(model, batch)
            yield indices, log_p, errors
            bar.update(len(indices))


def score_pictures(model, scorer, pictures, batch_size, lengths, num_workers=0):
    """float32 [pictures, labels]: score_batches over all ranks, every picture once, every rank gets all.

    lengths (image tokens a picture): like lengths share a batch, so little is padded. Raises UserError for a picture
    that can no longer be read.
    """
    import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state = PartialState()
    order = sorted(range(len(pictures)), key=lambda i: -lengths[i])  # longest first: what cannot fit fails at once
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    share = batches[state.process_index :: state.num_processes]
    done = list(score_batches(model, scorer, pictures, share, num_workers))
    result = torch.empty(len(pictures), len(scorer.labels))
    lost = {}
    for indices, log_p, errors in gather_object(done):
        result[indices] = log_p
        lost |= errors
    if lost:
        first = min(lost)
        raise UserError(
            f"{len(lost)} pictures became unreadable after they were checked, {pictures[first]} ({lost[first]}) among "
            "them; put them back or run again, and the check will leave them out"
        )
    return result


def wilson_interval(correct, n, z=1.959963984540054):
    """95 % interval of a proportion (Wilson 1927): [low, high]; [0, 1] for n = 0."""
    if n == 0:
        return [0.0, 1.0]
    p = correct / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return [max(0.0, centre - half), min(1.0, centre + half)]


def measure(labels, truth, predicted):
    """Metrics of two equally long lists of class numbers; scikit-learn computes them. A label never seen scores 0."""
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_recall_fscore_support

    classes = list(range(len(labels)))
    precision, recall, f1, support = precision_recall_fscore_support(
        truth, predicted, labels=classes, zero_division=0.0
    )
    n, accuracy = len(truth), float(accuracy_score(truth, predicted))
    present = [c for c in classes if c in set(truth) | set(predicted)]
    return {
        "n": n,
        "accuracy": accuracy,
        "accuracy_ci95": wilson_interval(round(accuracy * n), n),
        "chance": 1 / len(labels),
        "macro_f1": float(f1_score(truth, predicted, labels=present, average="macro", zero_division=0.0)),
        "per_class": {
            label: {"precision": float(p), "recall": float(r), "f1": float(f), "n": int(s)}
            for label, p, r, f, s in zip(labels, precision, recall, f1, support, strict=True)
        },
        "confusion_matrix": confusion_matrix(truth, predicted, labels=classes).tolist(),  # [truth][prediction]
        "labels": labels,
    }


def validate(args):
    """Score args.model_name_or_path on the held-out split, on all ranks.

    Returns (report, rows): the dict of report.json, and the rows of predictions.csv, on every rank.
    """
    config = settings.take(args)
    data = load_split(config, "validation")
    processor = load_processor(args.model_name_or_path)
    scorer = Scorer(processor, config)
    model = load_model(args.model_name_or_path, args.dtype)
    pictures = [images[0] for images in data["images"]]
    started = time.perf_counter()
    batch_size, workers = args.per_device_eval_batch_size, args.dataloader_num_workers
    log_p = score_pictures(model, scorer, pictures, batch_size, list(data["image_tokens"]), workers)
    seconds = time.perf_counter() - started
    probability = log_p.softmax(1)  # over the labels
    predicted = probability.argmax(1).tolist()
    truth = [scorer.labels.index(label) for label in data["label"]]
    report = measure(scorer.labels, truth, predicted) | {
        "model": args.model_name_or_path,
        "seconds": seconds,
        "images_per_second": len(pictures) / seconds,
    }
    rows = [
        {
            "image": picture,
            "label": scorer.labels[t],
            "prediction": scorer.labels[p],
            "probability": float(row[p]),
            "correct": t == p,
            **dict(zip(scorer.labels, row.tolist(), strict=True)),
        }
        for picture, t, p, row in zip(pictures, truth, predicted, probability, strict=True)
    ]
    return report, rows


def write_report(report, rows, folder):
    """report.json and predictions.csv into `folder`; each appears whole or not at all."""
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "predictions.csv.tmp"), "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    with open(os.path.join(folder, "report.json.tmp"), "w", encoding="utf-8") as file:
        json.dump(report, file, indent=2, ensure_ascii=False)
    for name in ("predictions.csv", "report.json"):
        os.replace(os.path.join(folder, name + ".tmp"), os.path.join(folder, name))


def print_report(report, folder):
    """The table for people, then the line for programs."""
    low, high = report["accuracy_ci95"]
    print(f"\n{'label':<12} {'n':>5} {'precision':>9} {'recall':>7} {'f1':>6}")
    for label, row in report["per_class"].items():
        print(f"{label:<12} {row['n']:>5} {row['precision']:>9.3f} {row['recall']:>7.3f} {row['f1']:>6.3f}")
    print(
        f"\naccuracy {report['accuracy']:.4f} (95 % interval {low:.4f} to {high:.4f}, n = {report['n']}, "
        f"chance {report['chance']:.2f}), macro-F1 {report['macro_f1']:.4f}\n"
        f"{report['seconds']:.1f} s, {report['images_per_second']:.1f} images/s; files in {folder}"
    )
    brief = ("accuracy", "n", "chance", "macro_f1", "images_per_second", "accuracy_ci95", "seconds", "model")
    print(json.dumps({key: report[key] for key in brief} | {"report": os.path.join(folder, "report.json")}))


def checkpoint_name(path):
    """`runs/sft/checkpoint-100` -> `sft-checkpoint-100`, `sft-llava-1.6-7b` -> itself: the report's folder name."""
    parts = os.path.normpath(path).split(os.sep)
    return "-".join(parts[-2:]) if parts[-1].startswith("checkpoint-") else parts[-1]


def add_inference_flags(parser):
    """The flags that validation.py and test.py share."""
    parser.add_argument("--model_name_or_path", default=settings.TRAINING_DEFAULTS["output_dir"], help="checkpoint")
    parser.add_argument("--per_device_eval_batch_size", type=int, default=8, help="pictures a forward pass and rank")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"], help="of the weights"
    )
    parser.add_argument("--dataloader_num_workers", type=int, default=0, help="processes a rank that decode pictures")


def preflight(config, model_name_or_path, splits):
    """What can be known in a second: the checkpoint is there and the pictures are fit for use (caches are built).

    Imports no torch. Returns prepare()'s summaries; raises one UserError with every problem found.
    """
    problems = []
    for check in (
        lambda: require_checkpoint(model_name_or_path),
        lambda: prepare(config, splits=splits, model_name_or_path=base_of(model_name_or_path)),
    ):
        try:
            summary = check()
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return summary


def main():
    parser = settings.parser(__doc__.splitlines()[0])
    add_inference_flags(parser)
    parser.add_argument("--report_dir", default="logs/validation", help="a folder a checkpoint is made in it")
    args = parser.parse_args()
    config = settings.take(args)
    preflight(config, args.model_name_or_path, ("validation",))
    from accelerate import PartialState

    report, rows = validate(args)
    if PartialState().is_main_process:
        folder = os.path.join(args.report_dir, checkpoint_name(args.model_name_or_path))
        write_report(report, rows, folder)
        print_report(report, folder)
    if PartialState().num_processes > 1:
        PartialState().destroy_process_group()


if __name__ == "__main__":
    settings.run(main)
