"""How good is a checkpoint? Closed-set accuracy on the held-out pictures.

    sh validation.sh                                                    # the training output, all GPUs
    sh validation.sh --model_name_or_path model                         # the untuned model
    sh validation.sh --compare_with logs/validation/model               # is it really better than that report's?
    sh validation.sh --all_checkpoints                                  # which checkpoint-N is best?
    sh validation.sh --rivals untuned,probe,clip --clip_model clip      # was the fine-tuning, was the 7B worth it?
    python validation.py --model_name_or_path sft-llava-1.6-7b/checkpoint-100 --per_device_eval_batch_size 4

Leaves <report_dir>/<checkpoint name>/{report.html, report.json, predictions.csv, confusion_matrix.png,
reliability.png} and TensorBoard events at the checkpoint's step in <logging_dir>/<run>/validation; prints a table,
and as the last line of stdout one JSON object. Nothing is generated: the labels are scored in one forward pass a
batch (see Scorer), so every picture gets a probability for each and an answer that is always one of them.
"""

import argparse
import csv
import os
import time
from importlib.metadata import version

import config as settings
from animals.checkpoint.steps import checkpoint_name, find_checkpoints, global_step, run_name
from animals.checkpoint.task import WORDS, settings_for
from animals.command import run
from animals.pictures.cache import load_split
from animals.pictures.leaks import known_leaks
from animals.ranks import choose_arithmetic, main_process, say
from animals.scoring.best_checkpoint import rank_checkpoints
from animals.scoring.metrics import compare, measure, paired, without_leaks
from animals.scoring.plots import log_tensorboard
from animals.scoring.report import print_report, read_report, write_report
from animals.scoring.rivals import add_rival_flags, check_rivals, rivals, triples, untuned_rows, wanted
from animals.scoring.scorer import add_inference_flags, load_scorer, probabilities, score_pictures, stratified_sample
from animals.training.preflight import check_setup


def held_out(args, config):
    """The pictures to score, a datasets.Dataset."""
    data = load_split(config, "validation")
    if args.on_eval_pictures:
        data = data.select(stratified_sample(data["label"], config.eval_pictures))
    return data


def validate(args):
    """Score args.model_name_or_path on the held-out split, on all ranks.

    Returns (report, rows): the dict of report.json, and the rows of predictions.csv, on every rank. Raises UserError,
    before anything is loaded, if args.compare_with is about other pictures. The rival `untuned` is read from its own
    report, which main() makes where there is none.
    """
    import torch
    from accelerate import PartialState

    config = settings_for(settings.take(args), args.model_name_or_path)
    data = held_out(args, config)
    pictures = [images[0] for images in data["images"]]
    if args.compare_with:
        other, other_rows = read_report(args.compare_with)
        other_rows = paired(triples(data), other_rows, f"--compare_with {args.compare_with}")
    scorer, model = load_scorer(args.model_name_or_path, config, args.dtype)
    started = time.perf_counter()
    batch_size, workers = args.per_device_eval_batch_size, args.dataloader_num_workers
    log_p = score_pictures(model, scorer, pictures, batch_size, list(data["image_tokens"]), workers)
    seconds = time.perf_counter() - started
    probability = probabilities(log_p)
    predicted = log_p.argmax(1).tolist()
    truth = [scorer.labels.index(label) for label in data["label"]]
    right = [t == p for t, p in zip(truth, predicted, strict=True)]
    known = known_leaks(config)
    groups = [known["group"][picture] for picture in pictures] if known else None
    report = measure(scorer.labels, truth, predicted, probability, groups) | {
        "leaks": without_leaks(pictures, right, known),
        "model": args.model_name_or_path,
        "image_view": config.image_view,
        "question": config.question,
        "step": global_step(args.model_name_or_path),
        "held_out": len(load_split(config, "validation")),  # more than n with --on_eval_pictures
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "seconds": seconds,
        "images_per_second": len(pictures) / seconds,
        "dtype": args.dtype,
        "per_device_eval_batch_size": batch_size,
        "processes": PartialState().num_processes,
        "versions": {name: version(name) for name in ("torch", "transformers", "scikit-learn")},
        "excluded": read_held_out(config, "excluded.csv", ("image", "reason")),
        "suspects": read_held_out(config, "audit.csv", ("image", "label", "likely_label"), reason="label"),
        "comparison": None,
    }
    if args.compare_with:
        changed = [
            {"image": image, "prediction": scorer.labels[p], "other_prediction": row["prediction"]}
            for image, p, row in zip(pictures, predicted, other_rows, strict=True)
            if scorer.labels[p] != row["prediction"]
        ]
        where = {"model": other["model"], "where": args.compare_with, "changed": changed}
        report["comparison"] = compare(right, [row["correct"] for row in other_rows]) | where
    del model  # a rival may need its place
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    report["baselines"] = rivals(config, args, data, right)
    rows = [
        {
            "image": picture,
            "label": scorer.labels[t],
            "prediction": scorer.labels[p],
            "probability": row[p],
            "correct": t == p,
            "sha256": sha,  # by which reports are paired
            **dict(zip(scorer.labels, row, strict=True)),
        }
        for picture, t, p, sha, row in zip(pictures, truth, predicted, data["sha256"], probability, strict=True)
    ]
    return report, rows


def read_held_out(config, name, columns, **wanted):
    """The rows of a CSV in temp_dir about held-out pictures with these values, less other columns; [] without it."""
    wanted["split"] = "validation"
    try:
        with open(os.path.join(config.temp_dir, name), newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if wanted.items() <= row.items()]
    except FileNotFoundError:
        return []
    return [{key: row[key] for key in columns} for row in rows]


def add_flags(parser):
    """The flags of validation.py."""
    add_inference_flags(parser)
    parser.add_argument("--on_eval_pictures", action="store_true", help="only those that training measures itself on")
    parser.add_argument("--report_dir", default="logs/validation", help="a folder a checkpoint is made in it")
    parser.add_argument("--all_checkpoints", action="store_true", help="rank every checkpoint-N and the final model")
    parser.add_argument("--compare_with", metavar="REPORT", help="another report's folder: is the difference real?")
    add_rival_flags(parser)


def main():
    parser = settings.parser(__doc__.splitlines()[0])
    add_flags(parser)
    args = parser.parse_args()
    config = settings_for(settings.take(args), args.model_name_or_path)
    check_rivals(args)
    splits = ("train", "validation") if "probe" in wanted(args) else ("validation",)
    check_setup(config, args.model_name_or_path, splits, args.all_checkpoints)
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    on_cpu, args.dtype = choose_arithmetic(args.use_cpu, args.dtype)
    PartialState(cpu=on_cpu)  # the first one decides; without cpu=True CPU ranks stay strangers

    def run_one(path, **other):
        """All ranks; writes on the main one. -> (report, rows, folder)"""
        report, rows = validate(argparse.Namespace(**{**vars(args), "model_name_or_path": path, **other}))
        folder = os.path.join(args.report_dir, checkpoint_name(path))
        if main_process():
            write_report(report, rows, folder, config.language)
            log_tensorboard(report, rows, os.path.join(config.logging_dir, run_name(path), "validation"))
        return report, rows, folder

    made = broadcast_object_list(["untuned" in wanted(args) and untuned_rows(config, args, held_out(args, config))])
    if "untuned" in wanted(args) and not made[0]:
        say(f"scoring {args.untuned_model}, the rival `untuned`, which has no report on these pictures yet")
        words = {name: getattr(config, name) for name in WORDS}  # the same question and labels
        run_one(args.untuned_model, rivals=[], linear_probe=False, compare_with=None, **words)
    if args.all_checkpoints:
        table = os.path.join(args.report_dir, f"{run_name(args.model_name_or_path)}-checkpoints.csv")
        rank_checkpoints(find_checkpoints(args.model_name_or_path), run_one, table)
    else:
        report, _, folder = run_one(args.model_name_or_path)
        if main_process():
            print_report(report, folder)
    if PartialState().num_processes > 1:
        PartialState().destroy_process_group()


if __name__ == "__main__":
    run(main)
