"""How good is a checkpoint? Closed-set accuracy on the held-out pictures.

    sh validation.sh                                                    # the training output, all GPUs
    sh validation.sh --model_name_or_path model                         # the untuned model
    sh validation.sh --compare_with logs/validation/model               # is it really better than that report's?
    sh validation.sh --all_checkpoints                                  # which checkpoint-N is best?
    sh validation.sh --rivals untuned,probe,clip --clip_model clip      # was the fine-tuning, was the 7B worth it?
    python validation.py --model_name_or_path sft-llava-1.6-7b/checkpoint-100 --per_device_eval_batch_size 4

Leaves <report_dir>/<checkpoint name>/{report.html, report.json, predictions.csv, confusion_matrix.png,
reliability.png} and TensorBoard events at the checkpoint's step in <logging_dir>/<run>/validation; prints a table,
and as the last line of stdout one JSON object. Nothing is generated: the ten labels are scored in one forward pass a
batch (see Scorer), so every picture gets ten probabilities and an answer that is always one of the labels.
"""

import argparse
import csv
import gc
import os
import time
from importlib.metadata import version

import config as settings
from animals.checkpoint.steps import checkpoint_name, find_checkpoints, global_step, run_name
from animals.checkpoint.task import settings_for
from animals.command import run
from animals.pictures.leaks import known_leaks
from animals.pictures.prepare import load_split
from animals.ranks import say
from animals.scoring.metrics import compare, measure, paired, without_leaks
from animals.scoring.plots import log_tensorboard
from animals.scoring.ranking import rank_checkpoints
from animals.scoring.report import print_report, read_report, write_report
from animals.scoring.rivals import add_rival_flags, check_rivals, rivals, triples, untuned_rows, wanted
from animals.scoring.scorer import add_inference_flags, load_scorer, score_pictures, stratified_sample
from animals.training.preflight import preflight


def held_out(args):
    """The pictures to score, a datasets.Dataset."""
    config = settings.take(args)
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
