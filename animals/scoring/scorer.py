"""Log-probabilities of all labels for pictures, in one forward pass a batch: nothing is generated."""

import sys
from collections import Counter

import config as settings
from animals.checkpoint.load import load_model, load_processor
from animals.checkpoint.task import settings_for
from animals.command import UserError
from animals.pictures.read import PictureError, load_picture
from animals.ranks import main_process, say

LONG_PROMPT = 200  # tokens; the ten animals make 53


class Scorer:
    """Log-probabilities of all labels for a batch of pictures, in one forward pass.

    The answers ride behind the prompt in one sequence, each seeing the prompt and itself only (4-D attention mask),
    with positions that restart at the prompt's end. What a label scores is what teacher forcing gives it alone: the
    sum of log p over its answer tokens and </s>, tokenised within the whole conversation. Prompts are padded on the
    left, so the answers stand in the same columns of every row of a batch.
    """

    def __init__(self, processor, config):
        """Tokenises the prompt and all answers. Raises UserError if two have the same tokens or one has none."""
        import torch

        self.processor, self.config, self.labels = processor, config, config.labels
        self.most = sys.maxsize  # pictures that fit into memory at once, as far as is known
        prompt = self._token_ids()
        answers = []  # per label: token ids, </s> last
        for label in self.labels:
            tokens = self._token_ids(label)
            if tokens[: len(prompt)] != prompt or len(tokens) < len(prompt) + 2:
                raise UserError(f"label {label!r}: its tokens do not follow the prompt's; change --answer or --prompt")
            answers.append(tokens[len(prompt) :])
        if len({tuple(answer) for answer in answers}) < len(answers):
            raise UserError(f"labels {self.labels}: two of them have the same answer tokens; change --answer")
        self.answers = answers
        self.text_tokens = len(prompt) - 1 + max(map(len, answers))  # of a training example, beside its picture's
        if len(prompt) > LONG_PROMPT:
            say(
                f"the question takes {len(prompt) - 1} tokens beside each picture's, with {len(self.labels)} labels in "
                "it; --prompt without {labels} makes it short"
            )
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

    def _text(self, label=None):
        """The conversation as the model reads it, BOS included; without a label up to where the answer begins."""
        chat, template = self.config.conversation(label), self.config.chat_template
        return self.processor.apply_chat_template(chat, chat_template=template, tokenize=False)

    def _token_ids(self, label=None):
        return self.processor.tokenizer(self._text(label), add_special_tokens=False)["input_ids"]

    def collate(self, pictures):
        """RGB pictures -> model inputs on the CPU: prompts padded on the left, then the answers, mask and positions.

        A row each token, x what it sees; the answers " cat" and " spi der" after a prompt of four, one padded:
                        pad [INST] … [/INST] | cat | spi der
            [/INST]          x     x    x    |     |           its logits say "cat" and "spi"
            cat              x     x    x    |  x  |           …  "</s>" of cat
            spi              x     x    x    |     |  x        …  "der"
            der              x     x    x    |     |  x   x    …  "</s>" of spider
        """
        import torch

        batch = self.processor(
            images=pictures,
            text=[self._text()] * len(pictures),
            padding=True,
            padding_side="left",
            add_special_tokens=False,  # the template has BOS
            return_tensors="pt",
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

    def score(self, model, batch, halve=True):
        """-> float32 [batch, labels] on the CPU, log-probabilities of the labels (not normalised over them).

        A batch that does not fit the GPU's memory is halved until it does, that is said, and the batches after it go
        in such parts at once. halve=False raises UserError instead: under ZeRO-3 ranks run the same forward passes.
        """
        import torch

        size, logits = len(batch["input_ids"]), None
        plain = getattr(model, "module", model)  # DeepSpeed's engine has no dtype
        if size <= self.most:
            try:
                inputs = {key: value.to(plain.device) for key, value in batch.items()}
                inputs["pixel_values"] = inputs["pixel_values"].to(plain.dtype)
                with torch.no_grad():  # inference_mode would spoil the weights that ZeRO-3 gathers in it
                    logits = model(**inputs, logits_to_keep=len(self.fed_ids) + 1, use_cache=False).logits
            except torch.OutOfMemoryError:
                if not halve:
                    raise UserError(
                        f"out of memory in evaluation with {size} pictures at once; expected them to fit; lower "
                        "--per_device_eval_batch_size"
                    ) from None
                if size == 1:
                    raise
                self.most = (size + 1) // 2
                print(f"out of memory with {size} pictures at once: going on with {self.most}", file=sys.stderr)
        if logits is None:  # out here, because the exception kept all activations alive
            inputs = None
            parts = slice(size // 2), slice(size // 2, None)
            halves = [{key: value[part] for key, value in batch.items()} for part in parts]
            return torch.cat([self.score(model, half) for half in halves])
        log_p = logits.float().log_softmax(-1).cpu()[:, self.target_row, self.target_ids]  # [batch, predicted]
        return torch.zeros(size, len(self.labels)).index_add_(1, self.target_label, log_p)


def probabilities(log_p) -> list[list[float]]:
    """Scorer.score()'s log-probabilities [pictures, labels] -> each label's share of one among the labels."""
    return log_p.double().softmax(1).tolist()


def score_batches(model, scorer, pictures, batches, num_workers=0, in_step=False):
    """Yields (indices, log_p, errors) for each list of indices in `batches`, on this rank alone.

    pictures are paths; log_p is float32 [indices, labels], NaN in the row of a picture that cannot be read; errors
    maps such an index to the reason. in_step: one forward pass a batch, whatever happens, as ZeRO-3 needs it. A bar on
    rank 0's terminal.
    """
    import torch
    from PIL import Image
    from tqdm import tqdm

    def collate(indices):
        opened, errors = {}, {}
        for i in indices:
            try:
                opened[i] = load_picture(pictures[i])
            except PictureError as error:
                errors[i] = str(error)
        shown = list(opened.values()) or [Image.new("RGB", (8, 8))] * in_step
        return indices, list(opened), errors, scorer.collate(shown) if shown else None

    loader = torch.utils.data.DataLoader(batches, batch_size=None, collate_fn=collate, num_workers=num_workers)
    with tqdm(total=sum(map(len, batches)), unit="image", disable=not main_process() or None) as bar:
        for indices, readable, errors, batch in loader:
            log_p = torch.full((len(indices), len(scorer.labels)), float("nan"))
            if batch is not None:
                found = scorer.score(model, batch, halve=not in_step)
                log_p[[indices.index(i) for i in readable]] = found[: len(readable)]
            yield indices, log_p, errors
            bar.update(len(indices))


def score_pictures(model, scorer, pictures, batch_size, lengths, num_workers=0, in_step=False):
    """float32 [pictures, labels]: score_batches over all ranks, every picture once, every rank gets all.

    lengths (image tokens a picture): like lengths share a batch, so little is padded. in_step: every rank runs the
    same number of forward passes, as ZeRO-3 needs it (a repeated batch gives the same rows again). Raises UserError
    for a picture that can no longer be read.
    """
    import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state = PartialState()
    order = sorted(range(len(pictures)), key=lambda i: -lengths[i])  # longest first: what cannot fit fails at once
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    share = batches[state.process_index :: state.num_processes]
    if in_step and len(share) < -(-len(batches) // state.num_processes):
        share.append(batches[-1])
    done = list(score_batches(model, scorer, pictures, share, num_workers, in_step))
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


def stratified_sample(labels, n, seed=0):
    """Indices of n pictures with the classes in proportion, the same for the same list; all of them for n = 0."""
    import random

    shuffled = list(range(len(labels)))
    random.Random(seed).shuffle(shuffled)
    size, seen, place = Counter(labels), Counter(), {}
    for i in shuffled:
        place[i] = (seen[labels[i]] + 0.5) / size[labels[i]]  # how far through its class, 0 to 1
        seen[labels[i]] += 1
    return sorted(sorted(shuffled, key=place.__getitem__)[: n or len(labels)])


def load_scorer(path, config, dtype):
    """(scorer, model) of a checkpoint, asked with its own words.

    All ranks; if one of them cannot read it, each raises UserError.
    """
    from accelerate.utils import gather_object

    problem = scorer = model = None
    try:
        config = settings_for(config, path)
        scorer = Scorer(load_processor(path, config.image_view), config)
        model = load_model(path, dtype, config.image_view)
    except UserError as error:
        problem = str(error)
    except Exception as error:  # transformers, tokenizers and safetensors raise nearly anything on damaged files
        said = (str(error).splitlines() or [""])[0]
        problem = f"{path}: found {type(error).__name__} ({said}); expected a whole checkpoint; save or fetch it again"
    if problems := [text for text in gather_object([problem]) if text]:
        raise UserError(problems[0])
    return scorer, model


def add_inference_flags(parser):
    """The flags that validation.py and test.py share."""
    parser.add_argument("--model_name_or_path", default=settings.TRAINING_DEFAULTS["output_dir"], help="checkpoint")
    parser.add_argument("--per_device_eval_batch_size", type=int, default=8, help="pictures a forward pass and rank")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"], help="of the weights"
    )
    parser.add_argument("--use_cpu", action="store_true", help="although there is a GPU")
    parser.add_argument("--dataloader_num_workers", type=int, default=0, help="processes a rank that decode pictures")
