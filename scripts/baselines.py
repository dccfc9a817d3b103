"""Compare a report of validation.sh with simpler ways to name the same pictures: was the fine-tuning worth it?

    python scripts/baselines.py logs/validation/sft-llava-1.6-7b --untuned model --probe --clip_model clip

Writes a row per baseline into report.json of that folder (key `baselines`) and into report.html, and prints the rows.
Pictures, labels and question are those of the report; each baseline is compared with the model picture by picture:

majority   always the most frequent label of the held-out pictures
untuned    the checkpoint before the fine-tuning; if there is no report of it on these pictures yet, it is made first
probe      logistic regression on the features of the frozen vision tower, fitted to the training pictures
clip       zero-shot CLIP: the label whose sentence is most like the picture
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import config as settings
from animals.checkpoint.check import read_shards, require_checkpoint
from animals.checkpoint.steps import checkpoint_name
from animals.checkpoint.task import checkpoint_id, settings_for
from animals.command import Findings, UserError, run
from animals.files import read_json
from animals.pictures.cache import load_split
from animals.pictures.prepare import check_inputs
from animals.ranks import choose_arithmetic
from animals.scoring.features import STRENGTHS, Encoder, encoder_name, features, load_tower, precision, regression
from animals.scoring.metrics import compare, design_effect, paired, wilson_interval
from animals.scoring.report import read_report, write_report

CLIP_PROMPT = "a photo of a {label}"  # CLIP's own (openai/CLIP README)
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


def find_report(checkpoint, config, report, pictures, report_dir):
    """The folder of the checkpoint's report on the pictures and the question of `report`; made if there is none yet.

    A report that is there is used if its checkpoint had today's files, question, answers and dtype (checkpoint_id).
    """
    folder = os.path.join(report_dir, checkpoint_name(checkpoint))
    values = {name: getattr(config, name) for name in FIELDS} | {"folder_to_label": json.dumps(config.folder_to_label)}
    asked = settings_for(settings.Config(**values), checkpoint)  # as validation.py does
    identity = checkpoint_id(checkpoint, choose_arithmetic(False, report["dtype"])[1], asked)
    try:
        if untuned(folder, pictures)[1]["checkpoint"] == identity:
            return folder
    except UserError:
        pass  # there is none, or one of other pictures
    print(f"scoring {checkpoint}, the baseline `untuned`, which has no report on these pictures yet", file=sys.stderr)
    values |= {name: report[name] for name in ("dtype", "per_device_eval_batch_size")}
    values |= {"eval_pictures": report["n"], "model_name_or_path": checkpoint, "report_dir": report_dir}
    command = [sys.executable, ROOT / "scripts" / "launch.py", "validation.py"]
    command += [f"--{name}={value}" for name, value in values.items()]
    command += ["--on_eval_pictures"] * (report["n"] < report["held_out"])
    if code := subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise UserError(f"{checkpoint}: its validation ended with exit code {code}; what it said stands above")
    return folder


def untuned(folder, pictures):
    """(a label per picture, further keys of the row) from the report in `folder`; pictures as paired() takes them."""
    report, rows = read_report(folder)
    answers = [row["prediction"] for row in paired(pictures, rows, folder)]
    return answers, {key: report.get(key) for key in ("model", "checkpoint", "question")}


def probe(model, config, rows):
    """(a label per row, further keys of the row in the table) by regression on the features of the vision tower."""
    tower, train = load_tower(model), load_split(config, "train")
    known = features(tower, [images[0] for images in train["images"]], train["sha256"][:], config)
    held_out = features(tower, [row["image"] for row in rows], [row["sha256"] for row in rows], config)
    answers, strength = fit(known, train["label"][:], held_out)
    return answers, {"model": model, "n_train": len(known), "features": known.shape[1], "C": strength}


def fit(train, labels, held_out):
    """(a label per row of `held_out`, the C that is best on a tenth of `train`). Features are float32 [n, features]."""
    from sklearn.model_selection import GridSearchCV, ShuffleSplit
    from threadpoolctl import threadpool_limits

    tenth = ShuffleSplit(1, test_size=0.1, random_state=0)
    search = GridSearchCV(regression(), {"logisticregression__C": STRENGTHS}, cv=tenth)
    with threadpool_limits(1):  # in such small products threads wait for each other longer than they work
        search.fit(train, labels)
    return search.predict(held_out).tolist(), search.best_params_["logisticregression__C"]


def clip(folder, config, labels, rows):
    """As probe(), zero-shot as in Radford et al. 2021 (arXiv:2103.00020): the sentence with the largest cosine."""
    import numpy as np
    import torch
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    model = CLIPModel.from_pretrained(folder, dtype=precision()).eval()
    images = AutoImageProcessor.from_pretrained(folder, backend="pil")
    sentences = [CLIP_PROMPT.replace("{label}", label) for label in labels]
    tokens = AutoTokenizer.from_pretrained(folder)(sentences, padding=True, return_tensors="pt")
    with torch.inference_mode():
        text = model.float().get_text_features(**tokens).pooler_output.numpy()  # [labels, features]
    encoder = Encoder(
        encoder_name(model.state_dict(), images),
        model.to(precision()),
        lambda pictures: images(pictures, return_tensors="pt")["pixel_values"],
        lambda module, pixels: module.get_image_features(pixel_values=pixels).pooler_output.float(),
    )
    pictures = features(encoder, [row["image"] for row in rows], [row["sha256"] for row in rows], config)
    scores = pictures @ (text / np.linalg.norm(text, axis=1, keepdims=True)).T  # cosine x length of the picture's row
    return [labels[k] for k in scores.argmax(1)], {"model": folder, "prompt": CLIP_PROMPT}


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
        f"\n{'baseline':<12} {'accuracy':>8}  95 % interval   {'difference':>10}  95 % interval     this checkpoint is"
    )
    line = "{name:<12} {accuracy:>8.4f}  {:.4f}, {:.4f}  {difference:>+10.4f}  {:+.4f}, {:+.4f}  {verdict}"
    for row in rows:
        verdict = {"not_established": "not established to be better or worse"}.get(row["verdict"], row["verdict"])
        print(line.format(*row["accuracy_ci95"], *row["difference_ci95"], **row | {"verdict": verdict}))
    print("on these pictures, for one training run of each")


def main():
    parser = settings.parser(__doc__.splitlines()[0], FIELDS)
    parser.add_argument("report", metavar="REPORT_DIR", help="the folder of a report that validation.sh wrote")
    parser.add_argument("--untuned", metavar="DIR", help="the checkpoint before fine-tuning, or its report's folder")
    parser.add_argument("--probe", action="store_true", help="on the vision tower of --untuned's checkpoint, or model/")
    parser.add_argument("--clip_model", metavar="DIR", help="e.g. a copy of openai/clip-vit-large-patch14-336")
    args = parser.parse_args()
    report, rows = read_report(args.report)
    if "group" not in rows[0]:  # an older version wrote it
        raise UserError(
            f"{args.report}: found no column group in its predictions.csv; expected one, which tells near-duplicates "
            "apart from other pictures; run validation.sh for that checkpoint again"
        )
    folder = os.path.abspath(args.report if os.path.isdir(args.report) else os.path.dirname(args.report))
    config, problems = settings_for(settings.config_from(args), report["model"]), Findings()
    model, untuned_report = args.untuned or "model", None
    if args.untuned and os.path.isfile(os.path.join(args.untuned, "report.json")):
        model, untuned_report = read_report(args.untuned)[0]["model"], args.untuned
    if args.probe or args.untuned and not untuned_report:
        problems.attempt(check_untuned, config, report, model, args.probe)
    if args.clip_model:
        problems.attempt(check_clip, args.clip_model)
    problems.report()

    table = [baseline("majority", rows, [report["majority_label"]] * len(rows), {})]
    if args.untuned:
        pictures = [(row["image"], row["sha256"], row["label"]) for row in rows]
        other = untuned_report or find_report(model, config, report, pictures, os.path.dirname(folder))
        table.append(baseline("untuned", rows, *untuned(other, pictures)))
    if args.probe:
        table.append(baseline("probe", rows, *probe(model, config, rows)))
    if args.clip_model:
        table.append(baseline("clip", rows, *clip(args.clip_model, config, report["labels"], rows)))
    write_report(report | {"baselines": table}, rows, folder, config.language)
    print_baselines(table)


if __name__ == "__main__":
    run(main)
