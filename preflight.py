"""Everything that can be known to go wrong before the weights load, found together and said in one message.

preflight() takes a second and imports no torch: the launcher calls it before anything slow starts. check_run() adds
what needs the parsed training flags.
"""

import json
import os
import shutil

from checkpoint import find_checkpoints
from config import UserError
from data_process_utils import prepare
from hub_layout import base_of, holds_model, require_checkpoint

GIB = 2**30


def collect(*checks):
    """Run all checks, then raise one UserError with every problem they raised. Returns what they returned."""
    results, problems = [], []
    for check in checks:
        try:
            results.append(check())
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return results


def preflight(config, model_name_or_path, splits, all_checkpoints=False):
    """The checkpoint is there, and the pictures are fit for use; builds their caches. Returns prepare()'s summary.

    all_checkpoints: a run's folder will do as well; its newest whole checkpoint says how many tokens a picture has.
    """
    path = model_name_or_path
    if all_checkpoints:
        found = find_checkpoints(path)
        path = next((p for p in reversed(found) if holds_model(p)), path)
    return collect(
        lambda: require_checkpoint(path),
        lambda: prepare(config, splits=splits, model_name_or_path=base_of(path)),
    )[1]


def count_parameters(path) -> int:
    """Parameters in a checkpoint's safetensors files, read from their headers."""
    total = 0
    for name in os.listdir(path):
        if name.endswith(".safetensors"):
            with open(os.path.join(path, name), "rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            for tensor, entry in header.items():
                if tensor != "__metadata__":
                    size = 1
                    for length in entry["shape"]:
                        size *= length
                    total += size
    return total


def check_disk(args, parameters):
    """Room for save_total_limit checkpoints, one being written, one being deleted, and the final model.

    Bytes a parameter: 2 in safetensors (bf16) and, for resuming, 4 of fp32 master and 2.03 of 8-bit states.
    """
    resumable = 0 if args.save_only_model else 6.03
    checkpoint = parameters * (2 + resumable)
    kept = (args.save_total_limit or 0) + 2 if args.save_strategy != "no" else 0
    parent = os.path.abspath(args.output_dir)
    already = 0
    if os.path.isdir(parent):
        already = sum(os.path.getsize(os.path.join(d, f)) for d, _, files in os.walk(parent) for f in files)
    while not os.path.isdir(parent):
        parent = os.path.dirname(parent)
    needed, free = kept * checkpoint + parameters * 2, shutil.disk_usage(parent).free + already
    if free < needed:
        raise UserError(
            f"--output_dir {args.output_dir}: found {free / GIB:.1f} GiB free; expected {needed / GIB:.1f} GiB for "
            f"{kept} checkpoints of {checkpoint / GIB:.1f} GiB (--save_total_limit {args.save_total_limit} + 2) and "
            f"the model of {parameters * 2 / GIB:.1f} GiB; lower --save_total_limit, or choose another disk"
        )


def check_output_dir(output_dir):
    """Empty, absent, or a run of ours; and writable."""
    if os.path.isdir(output_dir):
        content = sorted(os.listdir(output_dir))
        ours = "run.json" in content or ".saving" in content or any(n.startswith("checkpoint-") for n in content)
        if content and not ours:
            raise UserError(
                f"--output_dir {output_dir}: found {', '.join(content[:3])} in it; expected an empty folder or an "
                "earlier run of train.py; choose another, or empty it"
            )
        parent = output_dir
    else:
        parent = os.path.dirname(os.path.abspath(output_dir))
        while not os.path.exists(parent):
            parent = os.path.dirname(parent)
    if not os.path.isdir(parent) or not os.access(parent, os.W_OK):
        raise UserError(f"--output_dir {output_dir}: {parent} cannot be written to; choose another folder")


def check_ranks(use_cpu):
    """No more ranks on this machine than GPUs."""
    import torch

    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    gpus = 0 if use_cpu else torch.cuda.device_count()
    if gpus and ranks > gpus:
        raise UserError(f"found {gpus} GPUs for {ranks} processes; expected one each; set NUM_PROCESSES={gpus} or less")
