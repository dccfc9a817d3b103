"""How good is a checkpoint? Closed-set accuracy on the held-out pictures.

    sh validation.sh                                          # what train.sh left, on all GPUs
    sh validation.sh --model_name_or_path model               # the untuned model
    sh validation.sh --compare_with logs/validation/model     # is it better than that report's?

Leaves report.html, report.json and predictions.csv in <report_dir>/<checkpoint name>, and TensorBoard events at the
checkpoint's step in <logging_dir>/<run>/validation. Prints a table, and as the last line of stdout one JSON object.
Nothing is generated: one forward pass per batch scores all labels, and the answer is always one of them.
"""

import csv
import os
import time
from importlib.metadata import version

import config as settings
from animals.checkpoint.steps import checkpoint_name, global_step, run_name
from animals.checkpoint.task import checkpoint_id, settings_for
from animals.command import run
from animals.pictures.cache import load_split
from animals.pictures.duplicates import known_duplicates
from animals.pictures.prepare import check_inputs
from animals.ranks import choose_arithmetic, main_process
from animals.scoring.metrics import compare, measure, paired, without_duplicates
from animals.scoring.plots import log_tensorboard
from animals.scoring.report import print_report, read_report, write_report
from animals.scoring.scorer import add_inference_flags, load_scorer, probabilities, score_pictures, stratified_sample


def validate(args, config):
    """Score args.model_name_or_path on the held-out split. All ranks call it.

    config: resolved for this checkpoint (settings_for). Returns (report, rows) on every rank: the dict of report.json,
    and the rows of predictions.csv. Raises UserError, before anything is loaded, if args.compare_with is about other
    pictures.
    """
    from accelerate import PartialState

    data = load_split(config, "validation")
    held_out = len(data)
    if args.on_eval_pictures:
        data = data.select(stratified_sample(data["label"], config.eval_pictures))
    pictures, sha256 = [images[0] for images in data["images"]], list(data["sha256"])
    if args.compare_with:
        other, other_rows = read_report(args.compare_with)
        ours = list(zip(pictures, sha256, data["label"], strict=True))
        other_rows = paired(ours, other_rows, f"--compare_with {args.compare_with}")
    scorer, model = load_scorer(args.model_name_or_path, config, args.dtype, end=not args.without_end)
    labels, started = scorer.labels, time.perf_counter()
    batch_size, workers = args.per_device_eval_batch_size, args.dataloader_num_workers
    log_p = score_pictures(model, scorer, pictures, batch_size, list(data["image_tokens"]), workers)
    seconds = time.perf_counter() - started
    probability, predicted = probabilities(log_p), log_p.argmax(1).tolist()
    truth, known = [labels.index(label) for label in data["label"]], known_duplicates(config)
    groups = [known["group"][picture] for picture in pictures] if known else range(len(pictures))
    rows = [
        {"image": picture, "label": labels[t], "prediction": labels[p], "probability": row[p], "correct": t == p}
        | {"sha256": sha, "group": group, **dict(zip(labels, row, strict=True))}  # sha256: by which reports are paired
        for picture, t, p, sha, group, row in zip(pictures, truth, predicted, sha256, groups, probability, strict=True)
    ]
    right = [row["correct"] for row in rows]
    with open(os.path.join(config.temp_dir, "excluded.csv"), newline="", encoding="utf-8") as file:
        excluded = [row for row in csv.DictReader(file) if row["split"] == "validation"]
    report = measure(labels, truth, predicted, probability, groups) | {
        "duplicates": without_duplicates(pictures, right, known),
        "model": args.model_name_or_path,
        "checkpoint": checkpoint_id(args.model_name_or_path, args.dtype, config),  # by which baselines.py knows it
        "question": config.question,
        "step": global_step(args.model_name_or_path),
        "held_out": held_out,  # more than n with --on_eval_pictures
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "seconds": seconds,
        "images_per_second": len(pictures) / seconds,
        **{key: vars(args)[key] for key in ("dtype", "without_end", "per_device_eval_batch_size")},
        "processes": PartialState().num_processes,
        "versions": {name: version(name) for name in ("torch", "transformers", "scikit-learn")},
        "excluded": [{key: row[key] for key in ("image", "reason")} for row in excluded],
        "comparison": None,
    }
    if args.compare_with:
        changed = [
            {"image": row["image"], "prediction": row["prediction"], "other_prediction": before["prediction"]}
            for row, before in zip(rows, other_rows, strict=True)
            if row["prediction"] != before["prediction"]
        ]
        about = {"model": other["model"], "where": args.compare_with, "changed": changed}
        report["comparison"] = compare(right, [row["correct"] for row in other_rows], groups) | about
    return report, rows


def main():
    fields = (*settings.DATA_FIELDS, "logging_dir", "eval_pictures", "language")
    parser = settings.parser(__doc__.splitlines()[0], fields)
    add_inference_flags(parser)
    parser.add_argument("--on_eval_pictures", action="store_true", help="only those that training measures itself on")
    parser.add_argument("--without_end", action="store_true", help="leave </s> out: for a model that is not fine-tuned")
    parser.add_argument("--report_dir", default="logs/validation", help="each checkpoint's report gets a folder in it")
    parser.add_argument("--compare_with", metavar="REPORT", help="another report's folder: is the difference real?")
    args = parser.parse_args()
    config = settings_for(settings.config_from(args), args.model_name_or_path)
    check_inputs(config, args.model_name_or_path, ("validation",))
    from accelerate import PartialState

    on_cpu, args.dtype = choose_arithmetic(args.use_cpu, args.dtype)
    PartialState(cpu=on_cpu)  # the first one decides for the process; cpu=True connects the ranks of a CPU run
    report, rows = validate(args, config)
    if main_process():
        folder = os.path.join(args.report_dir, checkpoint_name(args.model_name_or_path))
        write_report(report, rows, folder, config.language)
        log_tensorboard(report, os.path.join(config.logging_dir, run_name(args.model_name_or_path), "validation"))
        print_report(report, folder)
    PartialState().destroy_process_group()


if __name__ == "__main__":
    run(main)
