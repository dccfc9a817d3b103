"""How good is a checkpoint? Closed-set accuracy on the held-out pictures.

    sh validation.sh                                          # what train.sh left, on all GPUs
    sh validation.sh --model_name_or_path model               # the untuned model
    sh validation.sh --compare_with logs/validation/model     # is it better than that report's?

Leaves report.html, report.json and predictions.csv in <report_dir>/<checkpoint name>, and TensorBoard events at the
checkpoint's step in <logging_dir>/<run>/validation. Prints a table, and as the last line of stdout one JSON object.
Nothing is generated: one forward pass per batch scores all labels, and the answer is always one of them.
"""

import contextlib
import os
import time
from datetime import timedelta
from importlib.metadata import version

import config as settings
from animals.checkpoint.card import add_result, read_card
from animals.checkpoint.family import read_settings
from animals.checkpoint.steps import CHOSEN, checkpoint_name, global_step, run_name
from animals.checkpoint.task import checkpoint_id, settings_for
from animals.command import run
from animals.files import require_writable
from animals.pictures.cache import checked_entry, load_split, lock
from animals.pictures.duplicates import known_duplicates
from animals.pictures.moves import read_moves
from animals.pictures.prepare import check_inputs
from animals.pictures.read import PictureError, load_picture
from animals.ranks import check_connection, choose_arithmetic, main_process
from animals.scoring.metrics import compare, measure, measured, paired, without_duplicates
from animals.scoring.plots import log_tensorboard
from animals.scoring.report import print_report, read_report, write_report
from animals.scoring.scorer import add_inference_flags, load_scorer, probabilities, score_pictures, stratified_sample


def quarantined_pictures(config):
    """{path: label} of the held-out pictures in quarantine; the label is None where a picture cannot be scored."""
    found = {}
    for step in read_moves(config.input_dir, "quarantine")["steps"]:
        for place, target in step["moves"]:
            split, folder, *_ = place.split("/")
            if split == "validation_data":
                path = os.path.join(config.input_dir, target)
                found[path] = None
                with contextlib.suppress(PictureError, KeyError):  # no longer there; a class that the table has not
                    load_picture(path)
                    found[path] = config.folder_to_label[folder]
    return found


def against(where, other, rows, other_rows):
    """`comparison` of report.json: this run's rows against those of the report `other` in the folder `where`."""
    changed = [
        {"image": row["image"], "prediction": row["prediction"], "other_prediction": before["prediction"]}
        for row, before in zip(rows, other_rows, strict=True)
        if row["prediction"] != before["prediction"]
    ]
    right, other_right = ([row["correct"] for row in some] for some in (rows, other_rows))
    groups = [row["group"] for row in rows]
    return compare(right, other_right, groups) | {"model": other["model"], "where": where, "changed": changed}


def chosen_on(pictures, rows):
    """`chosen` of report.json: on how many of `rows` the checkpoint was chosen, its accuracy on the others. Or None."""
    others = [(row["correct"], row["group"]) for row in rows if row["sha256"] not in pictures]
    accuracy, interval = measured(others) if others else (None, None)
    found = {"n_chosen_on": len(rows) - len(others), "n_others": len(others), "accuracy_others": accuracy}
    return found | {"accuracy_others_ci95": interval} if found["n_chosen_on"] else None


def validate(args, config):
    """Score args.model_name_or_path on the held-out split. All ranks call it.

    config: resolved for this checkpoint (settings_for). Returns (report, rows) on every rank: the dict of report.json,
    and the rows of predictions.csv. Raises UserError, before anything is loaded, if args.compare_with is about other
    pictures.
    """
    from accelerate import PartialState

    with lock(config):  # one state of the cache
        data, known = load_split(config, "validation"), known_duplicates(config)
        excluded = checked_entry(config, "validation")["excluded"]
    held_out, chosen = len(data), read_settings(args.model_name_or_path, CHOSEN) or {}
    if args.on_eval_pictures:
        data = data.select(stratified_sample(data["label"], config.eval_pictures))
    pictures, sha256 = [images[0] for images in data["images"]], list(data["sha256"])
    if args.compare_with:
        other, other_rows = read_report(args.compare_with)
        ours = list(zip(pictures, sha256, data["label"], strict=True))
        other_rows = paired(ours, other_rows, f"--compare_with {args.compare_with}")
    quarantined = quarantined_pictures(config)
    again = [] if args.on_eval_pictures else [path for path, label in quarantined.items() if label]
    scorer, model = load_scorer(args.model_name_or_path, config, args.dtype, end=not args.without_end)
    labels, started = scorer.labels, time.perf_counter()
    batch_size, workers = args.per_device_eval_batch_size, args.dataloader_num_workers
    log_p = score_pictures(model, scorer, pictures, batch_size, list(data["image_tokens"]), workers)
    seconds = time.perf_counter() - started
    said = score_pictures(model, scorer, again, batch_size, [0] * len(again), workers).argmax(1).tolist()
    (masses, probability), predicted = probabilities(log_p), log_p.argmax(1).tolist()
    truth = [labels.index(label) for label in data["label"]]
    groups = [known["group"][picture] for picture in pictures] if known else range(len(pictures))
    right = [t == p for t, p in zip(truth, predicted, strict=True)]
    columns = {"image": pictures, "label": data["label"], "prediction": [labels[p] for p in predicted]}
    columns |= {"probability": map(max, probability), "correct": right}
    columns |= {"sha256": sha256, "group": groups, "labels_mass": masses}  # sha256: by which reports are paired
    columns |= dict(zip(labels, zip(*probability, strict=True), strict=True))
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    there = [(quarantined[path] == labels[k], path) for path, k in zip(again, said, strict=True)]  # no near-duplicates
    accuracy_with, interval = measured([*zip(right, groups, strict=True), *there])
    with_quarantined = {"accuracy_with": accuracy_with, "accuracy_with_ci95": interval, "n_with": len(rows + there)}
    report = measure(labels, truth, predicted, probability, groups) | {
        "duplicates": without_duplicates(pictures, right, known),
        "quarantined": {"n": len(quarantined)} | with_quarantined if quarantined else None,
        "model": args.model_name_or_path,
        "checkpoint": checkpoint_id(args.model_name_or_path, args.dtype, config),  # by which baselines.py knows it
        "question": config.question,
        "labels_mass": sum(masses) / len(masses),
        "step": chosen.get("step") or global_step(args.model_name_or_path),
        "chosen": chosen_on({*(chosen.get("pictures") or ())}, rows),
        "held_out": held_out,  # more than n with --on_eval_pictures
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "seconds": seconds,
        "images_per_second": len(pictures) / seconds,
        **{key: vars(args)[key] for key in ("dtype", "without_end", "per_device_eval_batch_size")},
        "processes": PartialState().num_processes,
        "versions": {name: version(name) for name in ("torch", "transformers", "scikit-learn")},
        "excluded": [{"image": image, "reason": reason} for image, reason in excluded],
        "comparison": against(args.compare_with, other, rows, other_rows) if args.compare_with else None,
    }
    return report, rows


def main():
    fields = (*settings.DATA_FIELDS, "logging_dir", "eval_pictures", "language")
    parser = settings.parser(__doc__.splitlines()[0], fields)
    add_inference_flags(parser)
    parser.add_argument("--on_eval_pictures", action="store_true", help="only those that training measures itself on")
    parser.add_argument("--without_end", action="store_true", help="leave </s> out: for a model that is not fine-tuned")
    parser.add_argument("--report_dir", default="logs/validation", help="each checkpoint's report gets a folder in it")
    parser.add_argument("--compare_with", metavar="REPORT", help="another report's folder: is the difference real?")
    parser.add_argument("--write_model_card", action="store_true", help="add the result to the model's README.md")
    args = parser.parse_args()
    folder = os.path.join(args.report_dir, checkpoint_name(args.model_name_or_path))
    events = os.path.join(args.logging_dir, run_name(args.model_name_or_path), "validation")
    for flag, place in (("--report_dir", args.report_dir), ("--report_dir", folder), ("--logging_dir", events)):
        require_writable(flag, place)  # before the work, not after it
    if args.write_model_card:
        read_card(args.model_name_or_path)
    config = settings_for(settings.config_from(args), args.model_name_or_path)
    check_inputs(config, args.model_name_or_path, ("validation",))
    from accelerate import PartialState

    on_cpu, args.dtype = choose_arithmetic(args.use_cpu, args.dtype)
    # The first one decides for the process; cpu=True connects the ranks of a CPU run. A slow rank may need hours more.
    PartialState(cpu=on_cpu, timeout=timedelta(hours=12))
    check_connection(PartialState().device)
    report, rows = validate(args, config)
    if main_process():
        write_report(report, rows, folder, config.language)
        log_tensorboard(report, events)
        if args.write_model_card:
            add_result(args.model_name_or_path, report, config.input_dir)
        print_report(report, folder)
    PartialState().destroy_process_group()


if __name__ == "__main__":
    run(main)
