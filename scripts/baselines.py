"""Compare a report of validation.sh with simpler ways to name the same pictures: was the fine-tuning worth it?

    python scripts/baselines.py logs/validation/sft-llava-1.6-7b --untuned model --probe --clip_model clip

Writes a row per baseline into report.json of that folder (key `baselines`) and into report.html, and prints the rows.
Pictures, labels and question are those of the report; each baseline is compared with the model picture by picture:

majority   always the most frequent label of the held-out pictures
untuned    the checkpoint before the fine-tuning, scored with and without </s> (it was trained on other endings): the
           better one counts. Also the mean and range over three orders of the labels in the question
generated  the same checkpoint's own words, by greedy generation: right if they are the answer, whatever their case
probe      logistic regression on the features of the frozen vision tower, fitted to the training pictures
hidden     logistic regression on the last hidden state of the untuned checkpoint, from which it predicts its answer
clip       zero-shot CLIP: the label whose sentences are most like the picture, or its centre: the better one counts

Where the better of two counts, the held-out pictures have chosen it: that favours the baseline.
"""

import copy
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import config as settings
from animals.checkpoint.check import read_shards, require_checkpoint
from animals.checkpoint.steps import checkpoint_name
from animals.checkpoint.task import checkpoint_id, read_task, settings_for
from animals.command import Findings, UserError, run
from animals.files import read_json
from animals.pictures.cache import load_split
from animals.pictures.prepare import check_inputs
from animals.pictures.read import load_picture
from animals.ranks import choose_arithmetic
from animals.scoring.features import Encoder, encoder_name, features, fit, load_hidden, load_tower, precision
from animals.scoring.metrics import compare, design_effect, paired, wilson_interval
from animals.scoring.report import read_report, write_report
from animals.scoring.scorer import load_scorer

# Published for ImageNet: the seven that openai/CLIP's notebook Prompt_Engineering_for_ImageNet chose among its eighty.
CLIP_TEMPLATES = (
    "itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.", "a {} in a video game.",
    "art of the {}.", "a photo of the small {}.",
)  # fmt: skip
FIELDS = (*settings.DATA_FIELDS, "logging_dir", "language")  # validation.py takes all of them as flags, too


def check_untuned(config, report, path, with_pictures):
    """Raises UserError unless the settings are the report's, and checkpoint and training pictures are fit for use."""
    try:
        found, expected = (config.labels, config.question), (report["labels"], report.get("question"))
        if found != expected:
            raise UserError(
                f"found {found} in {report['model']} or config.py; expected {expected}, the labels and question of the "
                "report; give its --folder_to_label and --prompt"
            )
        if with_pictures:
            check_inputs(config, path, ("train",))
        else:
            require_checkpoint(path)
    except UserError as error:
        raise UserError("\n".join(f"--untuned, --probe: {line}" for line in str(error).splitlines())) from None


def check_clip(folder):
    """Raises UserError unless `folder` holds a CLIP."""
    file = os.path.join(folder, "config.json")
    kind = repr(read_json(file).get("model_type")) if os.path.isfile(file) else "no config.json there"
    if kind != "'clip'":
        raise UserError(
            f"--clip_model {folder}: found {kind}; expected the folder of a CLIP: "
            "`hf download openai/clip-vit-large-patch14-336 --local-dir clip`"
        )
    if problems := read_shards(folder)[1]:
        raise UserError("\n".join(problems))


def flags_for(checkpoint, config):
    """({flag: value} of validation.py for the checkpoint, the settings that it makes of them)."""
    values = {name: getattr(config, name) for name in FIELDS} | {"folder_to_label": json.dumps(config.folder_to_label)}
    return values, settings_for(settings.Config(**values), checkpoint)


def find_report(checkpoint, config, report, pictures, report_dir, end=True):
    """The folder of the checkpoint's report on the pictures and the question of `report`; made if there is none yet.

    A report that is there must be of today's checkpoint_id(). end: whether </s> is part of the answers.
    """
    folder = os.path.join(report_dir, checkpoint_name(checkpoint))
    values, asked = flags_for(checkpoint, config)
    identity = checkpoint_id(checkpoint, choose_arithmetic(False, report["dtype"])[1], asked)
    try:
        found = untuned(folder, pictures)[1]
        if (found["checkpoint"], found["without_end"]) == (identity, not end):
            return folder
    except UserError:
        pass  # there is none, or one of other pictures
    print(f"scoring {checkpoint}, the baseline `untuned`, which has no report on these pictures yet", file=sys.stderr)
    values |= {name: report[name] for name in ("dtype", "per_device_eval_batch_size")}
    values |= {"eval_pictures": report["n"], "model_name_or_path": checkpoint, "report_dir": report_dir}
    command = [sys.executable, ROOT / "scripts" / "launch.py", "validation.py"]
    command += [f"--{name}={value}" for name, value in values.items()]
    command += ["--on_eval_pictures"] * (report["n"] < report["held_out"]) + ["--without_end"] * (not end)
    if code := subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise UserError(f"{checkpoint}: its validation ended with exit code {code}; what it said stands above")
    return folder


def untuned(folder, pictures):
    """(a label per picture, further keys of the row) from the report in `folder`; pictures as paired() takes them."""
    report, rows = read_report(folder)
    answers = [row["prediction"] for row in paired(pictures, rows, folder)]
    return answers, {key: report.get(key) for key in ("model", "checkpoint", "question", "without_end")}


def untuned_at_its_best(model, config, report, pictures, report_dir):
    """As untuned(), of the better ending; further["orders"] are its accuracies with three orders of the labels."""
    truth = [label for _, _, label in pictures]

    def score(config, folder, end):
        answers, further = untuned(find_report(model, config, report, pictures, folder, end), pictures)
        return sum(map(str.__eq__, answers, truth)) / len(truth), answers, further

    places = {True: report_dir, False: os.path.join(report_dir, "without_end")}
    starts = [config.answer_for(label) for label in config.labels]
    only_end = any(a != b and b.startswith(a) for a in starts for b in starts)  # tells two answers apart
    found = [(*score(config, places[end], end), end) for end in (True, False)[: 2 - only_end]]
    accuracy, answers, further, end = max(found, key=lambda way: way[0])
    orders = [accuracy]
    for seed in (1, 2) if "{labels}" in config.prompt and read_task(model) is None else ():  # no order is its own
        other, table = copy.copy(config), list(config.folder_to_label.items())
        random.Random(seed).shuffle(table)
        other.folder_to_label = dict(table)
        other.temp_dir = os.path.join(config.temp_dir, "orders")  # the cache depends on the order
        orders.append(score(other, os.path.join(places[end], f"order_{seed}"), end)[0])
    return answers, further | {"variant": "end_counted" if end else "end_ignored", "orders": orders}


def generated(model, config, report, rows):
    """(a label per row, None where the text is none; further keys) by greedy generation, in batches."""
    import torch

    asked = flags_for(model, config)[1]
    scorer, network = load_scorer(model, asked, choose_arithmetic(False, report["dtype"])[1])
    label_of = {asked.answer_for(label).strip().casefold(): label for label in asked.labels}
    texts, size = [], report["per_device_eval_batch_size"]
    options = {"do_sample": False, "max_new_tokens": max(map(len, scorer.answers))}
    for start in range(0, len(rows), size):
        batch = scorer.prompts([load_picture(row["image"]) for row in rows[start : start + size]])
        batch = batch.to(network.device, network.dtype)  # integers keep their type
        with torch.inference_mode():
            out = network.generate(**batch, **options, pad_token_id=scorer.processor.tokenizer.pad_token_id)
        words = out[:, batch["input_ids"].shape[1] :]
        texts += scorer.processor.batch_decode(words, skip_special_tokens=True)
    return [label_of.get(text.strip().casefold()) for text in texts], {"model": model}


def probe(encoder, model, config, rows, batch_size=32):
    """(a label per row, further keys of the row in the table) by regression on the features of the encoder."""
    train = load_split(config, "train")
    known = features(encoder, [images[0] for images in train["images"]], train["sha256"][:], config, batch_size)
    held_out = features(encoder, [row["image"] for row in rows], [row["sha256"] for row in rows], config, batch_size)
    answers, strength = fit(known, train["label"][:], held_out)
    return answers, {"model": model, "n_train": len(known), "features": known.shape[1], "C": strength}


def hidden_probe(model, config, report, rows):
    """As probe(), by regression on the language model's last hidden states. Says first what it costs."""
    n = len(load_split(config, "train")) + len(rows)
    minutes = n / report["images_per_second"] * report["processes"] / 60
    print(
        f"--hidden_probe: {model} reads {n:,} pictures on one GPU, about {minutes:,.0f} minutes at the report's speed; "
        f"what is done is kept in {config.temp_dir}/features, so that an interrupted run goes on from there",
        file=sys.stderr,
    )
    encoder = load_hidden(model, flags_for(model, config)[1])
    return probe(encoder, model, config, rows, report["per_device_eval_batch_size"])


def clip(folder, config, labels, rows):
    """As probe(), zero-shot as in Radford et al. 2021 (arXiv:2103.00020): the label with the largest cosine.

    A label's features are the mean over CLIP_TEMPLATES; the better view of the pictures is further["variant"].
    """
    import numpy as np
    import torch
    from torch.nn.functional import normalize
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    model, tokenizer = (
        CLIPModel.from_pretrained(folder, dtype=precision()).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    model.float()
    text = []  # per label [features]
    for label in labels:
        sentences = [with_article(template.format(label)) for template in CLIP_TEMPLATES]
        with torch.inference_mode():
            found = model.get_text_features(**tokenizer(sentences, padding=True, return_tensors="pt")).pooler_output
        text.append(normalize(normalize(found).mean(0), dim=0).numpy())
    weights, side = model.to(precision()).state_dict(), model.config.vision_config.image_size
    squeezed, ways = {"do_center_crop": False, "size": {"height": side, "width": side}}, []
    for view, options in (("centre_crop", {}), ("squeezed", squeezed)):
        images = AutoImageProcessor.from_pretrained(folder, backend="pil", **options)
        encoder = Encoder(
            encoder_name(weights, images),
            model,
            lambda pictures, images=images: images(pictures, return_tensors="pt")["pixel_values"],
            lambda module, pixels: module.get_image_features(pixel_values=pixels).pooler_output.float(),
        )
        pictures = features(encoder, [row["image"] for row in rows], [row["sha256"] for row in rows], config)
        best = (pictures @ np.stack(text).T).argmax(1)  # cosine x length of the picture's row
        answers = [labels[k] for k in best]
        ways.append((sum(row["label"] == answer for row, answer in zip(rows, answers, strict=True)), view, answers))
    _, view, answers = max(ways, key=lambda way: way[0])
    return answers, {"model": folder, "variant": view, "templates": len(CLIP_TEMPLATES)}


def with_article(sentence):
    """`a elephant` -> `an elephant`, by the first letter."""
    return re.sub(r"\ba (?=[aeiou])", "an ", sentence)


def baseline(name, rows, answers, further):
    """The baseline's row in report.json: its accuracy and the model's difference to it, from its answer per picture."""
    right = [row["label"] == answer for row, answer in zip(rows, answers, strict=True)]
    groups = [row["group"] for row in rows]
    found, effect = compare([row["correct"] for row in rows], right, groups), design_effect(groups)
    accuracy = {"accuracy": found["other_accuracy"], "accuracy_ci95": wilson_interval(sum(right), len(right), effect)}
    keys = ("difference", "difference_ci95", "verdict", "only_this", "only_other")
    return {"name": name} | accuracy | {key: found[key] for key in keys} | further


def print_baselines(rows):
    """Print the table of scripts/baselines.py, rows of report["baselines"]. difference: this checkpoint - baseline."""
    print(
        f"\n{'baseline':<12} {'accuracy':>8}  95 % interval   {'difference':>10}  95 % interval     on these pictures"
    )
    line = "{name:<12} {accuracy:>8.4f}  {:.4f}, {:.4f}  {difference:>+10.4f}  {:+.4f}, {:+.4f}  {verdict}"
    for row in rows:
        print(line.format(*row["accuracy_ci95"], *row["difference_ci95"], **row).replace("_", " "), end="")
        print(f" ({row['variant'].replace('_', ' ')})" if "variant" in row else "")
        if len(orders := row.get("orders", ())) > 1:
            mean = sum(orders) / len(orders)
            print(
                f"{'':<12} {mean:>8.4f}  on average over {len(orders)} orders of the labels, {min(orders):.4f} to "
                f"{max(orders):.4f}"
            )


def main():
    parser = settings.parser(__doc__.splitlines()[0], FIELDS)
    parser.add_argument("report", metavar="REPORT_DIR", help="the folder of a report that validation.sh wrote")
    parser.add_argument("--untuned", metavar="DIR", help="the checkpoint before fine-tuning, or its report's folder")
    parser.add_argument("--probe", action="store_true", help="on the vision tower of --untuned's checkpoint, or model/")
    parser.add_argument("--hidden_probe", action="store_true", help="on its hidden states: it runs on all train_data")
    parser.add_argument("--clip_model", metavar="DIR", help="e.g. a copy of openai/clip-vit-large-patch14-336")
    args = parser.parse_args()
    report, rows = read_report(args.report)
    if "group" not in rows[0]:  # an older version wrote it
        raise UserError(
            f"{args.report}: found no column group in predictions.csv; expected one; run validation.sh again"
        )
    folder = os.path.abspath(args.report if os.path.isdir(args.report) else os.path.dirname(args.report))
    config, problems = settings_for(settings.config_from(args), report["model"]), Findings()
    model, untuned_report = args.untuned or "model", None
    if args.untuned and os.path.isfile(os.path.join(args.untuned, "report.json")):
        model, untuned_report = read_report(args.untuned)[0]["model"], args.untuned
    if args.probe or args.hidden_probe or args.untuned and not untuned_report:
        problems.attempt(check_untuned, config, report, model, args.probe or args.hidden_probe)
    if args.clip_model:
        problems.attempt(check_clip, args.clip_model)
    problems.report()

    table = [baseline("majority", rows, [report["majority_label"]] * len(rows), {})]
    pictures = [(row["image"], row["sha256"], row["label"]) for row in rows]
    if untuned_report:
        table.append(baseline("untuned", rows, *untuned(untuned_report, pictures)))
    elif args.untuned:
        found = untuned_at_its_best(model, config, report, pictures, os.path.dirname(folder))
        table.append(baseline("untuned", rows, *found))
        table.append(baseline("generated", rows, *generated(model, config, report, rows)))
    if args.probe:
        table.append(baseline("probe", rows, *probe(load_tower(model), model, config, rows)))
    if args.hidden_probe:
        table.append(baseline("hidden", rows, *hidden_probe(model, config, report, rows)))
    if args.clip_model:
        table.append(baseline("clip", rows, *clip(args.clip_model, config, report["labels"], rows)))
    write_report(report | {"baselines": table}, rows, folder, config.language)
    print_baselines(table)


if __name__ == "__main__":
    run(main)
