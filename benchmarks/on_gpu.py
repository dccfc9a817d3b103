"""Measure training and validation on the GPUs of this machine. It downloads nothing. No GPU has run it so far.

    python benchmarks/on_gpu.py                                   # the 7B: all rows need a card of 80 GB
    python benchmarks/on_gpu.py --rows projector                  # fits a card of 24 GB
    python benchmarks/on_gpu.py --model_name_or_path temp/demo/model --input_dir temp/demo/input    # on CPU ranks

The model has the hub's real config and tokenizer and seeded random weights (15 GB in --work); the pictures are drawn in
the sizes of photographs. Each row of ROWS is a `sh train.sh --rehearse` in both views, with 64 pictures per step on all
GPUs: seconds per step, peak memory, the share of time that waits for data. Then the first GPU compares validation.py's
scorer with batched generate() of two tokens, the fewest that an answer needs. Writes benchmarks/results/on_gpu.md.
Needs requirements-dev.txt (mistral-common holds the tokenizer), and for the 7B 55 GB of disk and 64 GB of host RAM.
"""

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]
from animals.checkpoint.image_tokens import image_token_count, read_geometry
from animals.checkpoint.load import load_model, load_processor
from animals.command import UserError, run
from animals.pictures.read import list_pictures, load_picture
from animals.ranks import count_gpus
from animals.scoring.scorer import Scorer, score_pictures
from benchmarks.scorer import SHAPES, generate, in_batches
from config import FOLDER_TO_LABEL, Config

DDP = "--config_file scripts/ddp.yaml"
ROWS = {  # name: flags of train.sh
    "zero3": "",  # all weights; the bf16 parameters are in host RAM (scripts/zero3.json)
    "lora": f"--use_peft --learning_rate 2e-4 {DDP}",
    "projector": f"--train_parts projector --learning_rate 1e-3 {DDP}",
}
MICRO_BATCH = {"tiles": 4, "whole": 8}


def draw_pictures(folder, count, seed=0):
    """Draw `count` JPEGs of smooth noise for training and half as many for validation, in the sizes of photographs."""
    import numpy as np
    from PIL import Image

    chance, noise = random.Random(seed), np.random.default_rng(seed)
    for split, n in (("train_data", count), ("validation_data", count // 2)):
        for i in range(n):
            place = folder / split / list(FOLDER_TO_LABEL)[i % len(FOLDER_TO_LABEL)]
            place.mkdir(parents=True, exist_ok=True)
            width, height = chance.choice(SHAPES)
            small = Image.fromarray(noise.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
            small.resize((width, height), Image.Resampling.BICUBIC).save(place / f"{i:04}.jpg", quality=90)


def machine():
    """The cards, the driver and the versions of the libraries, in one line."""
    card = f"CPU ({platform.machine()}, {os.cpu_count()} cores)"
    if count_gpus():
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
        card = f"{len(found)} x {found[0]} (name, driver, memory)"
    names = ("torch", "transformers", "trl", "accelerate", "deepspeed", "bitsandbytes", "peft")
    return f"{card}; Python {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in names)


def views(args):
    """{view: checkpoint folder}: the model in tiles, and its copy in the whole view, which is made once."""
    whole = args.work / "model-whole"
    if not whole.is_dir():
        command = [sys.executable, "scripts/whole_view.py", str(args.model_name_or_path), str(whole)]
        subprocess.run(command, cwd=ROOT, check=True)
    return {"tiles": args.model_name_or_path, "whole": whole}


def rehearse(args, name, view, model):
    """rehearsal.json of one row, with `sizes` and `pictures` per step; {"failed": last line} if the run failed."""
    ranks = int(os.environ.get("NUM_PROCESSES", max(1, count_gpus())))
    micro = min(MICRO_BATCH[view], max(1, args.effective_batch // ranks))
    accumulation = max(1, args.effective_batch // (micro * ranks))
    run_name = f"{name}-{view}"
    shutil.rmtree(args.work / "logs" / run_name, ignore_errors=True)
    command = (
        f"sh train.sh --rehearse --model_name_or_path {model} --input_dir {args.input_dir} "
        f"--temp_dir {args.work}/cache --logging_dir {args.work}/logs --output_dir {args.work}/{run_name} "
        f"--per_device_train_batch_size {micro} --gradient_accumulation_steps {accumulation} "
        f"--save_strategy no --num_train_epochs 100 --allow_leaks {ROWS[name]} {args.train_flags}"
    )
    print(f"{run_name}: {command}", flush=True)
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    file = args.work / "logs" / run_name / "rehearsal.json"
    if not file.is_file():
        return {"failed": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    sizes = f"{micro}x{accumulation}x{ranks}"
    return json.loads(file.read_text()) | {"sizes": sizes, "pictures": micro * accumulation * ranks}


def training_table(args):
    """Markdown: one row per rehearsal."""
    cache = args.work / "cache" / "train.json"
    lines = [
        "| what trains | view | micro-batch x accumulation x ranks | seconds per step | pictures/s | image tokens/s | "
        "peak GiB allocated | waiting for data |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in args.rows:
        for view, model in views(args).items():
            found = rehearse(args, name, view, model)
            if "failed" in found:
                lines.append(f"| {name} | {view} | | {found['failed'][:200]} | | | | |")
                continue
            tokens = [row["image_tokens"] for row in json.loads(cache.read_text())]
            speed = found["pictures"] / found["seconds_per_step"]
            memory = f"{max(gpu['allocated_gib'] for gpu in found['gpus']):.1f}" if found["gpus"] else "no GPU"
            lines.append(
                f"| {name} | {view} | {found['sizes']} | {found['seconds_per_step']:.2f} | {speed:.2f} | "
                f"{speed * sum(tokens) / len(tokens):,.0f} | {memory} | {found['waiting_for_data']:.1%} |"
            )
            print(lines[-1], flush=True)
    return "\n".join(lines)


def validation_table(args):
    """Markdown: the scorer and generate() on the same pictures in the same batches, in turns; each at its best."""
    import torch
    from accelerate import PartialState

    PartialState(cpu=not torch.cuda.is_available())
    found = list_pictures(os.path.join(args.input_dir, "validation_data"))[: args.pictures]
    lines = ["| view | scorer, 10 probabilities, images/s | generate(), 2 tokens, images/s |", "|---|---|---|"]
    for view, model in views(args).items():
        seconds = time_validation(args, model, found)
        lines.append(f"| {view} | {len(found) / seconds[0]:.2f} | {len(found) / seconds[1]:.2f} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def time_validation(args, folder, found):
    """[seconds of the scorer, seconds of generate()] for the pictures `found` with the checkpoint in `folder`."""
    config, geometry = Config(), read_geometry(folder)
    model, processor = load_model(folder, args.dtype), load_processor(folder)
    scorer, size = Scorer(processor, config), args.per_device_eval_batch_size
    lengths = [image_token_count(*load_picture(path).size, geometry) for path in found]
    ways = (
        lambda: score_pictures(model, scorer, found, size, lengths),
        lambda: generate(processor, model, config, found, in_batches(lengths, size), 2),
    )
    best = [float("inf")] * len(ways)
    for turn in range(args.rounds + 1):
        for i, way in enumerate(ways):
            started = time.perf_counter()
            way()
            if turn:
                best[i] = min(best[i], time.perf_counter() - started)
    return best


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="measure only these")
    add("--model_name_or_path", help="a checkpoint (default: the 7B with random weights, made in --work)")
    add("--input_dir", help="a folder like input/ (default: drawn pictures in --work)")
    add("--work", type=Path, default=Path("temp/on_gpu"), help="folder for everything that is made")
    add("--pictures", type=int, default=256, help="how many are drawn to train on; half as many to validate on")
    add("--effective_batch", type=int, default=64, help="pictures per step")
    add("--per_device_eval_batch_size", type=int, default=8, help="pictures per forward pass of the validation")
    add("--dtype", default="bfloat16", help="type of the weights in the validation")
    add("--rounds", type=int, default=3, help="measured rounds of the validation, after one that warms up")
    add("--train_flags", default="", help="further flags for train.sh, in one string")
    add("--output", type=Path, default=ROOT / "benchmarks" / "results" / "on_gpu.md", help="the file of the result")
    args = parser.parse_args()
    args.work = args.work.resolve()
    if args.model_name_or_path is None:
        if not count_gpus():
            raise UserError("found no GPU; expected one for the 7B; try the demo's model instead: see --help")
        import replica

        args.model_name_or_path = args.work / "model"
        if not (args.model_name_or_path / "model.safetensors.index.json").is_file():  # it is written last
            replica.build(args.model_name_or_path, layers=32, vision_layers=24, full_width=True)
    if args.input_dir is None:
        args.input_dir = args.work / "input"
        if not args.input_dir.is_dir():
            draw_pictures(args.input_dir, args.pictures)
    text = "\n\n".join(
        [
            "# Measured on GPUs" if count_gpus() else "# A try on CPU ranks: no figures for GPUs",
            f"{time.strftime('%Y-%m-%d')}: `python benchmarks/on_gpu.py {' '.join(sys.argv[1:])}`\n{machine()}",
            training_table(args),
            validation_table(args),
        ]
    )
    args.output.write_text(text + "\n", encoding="utf-8")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run(main)
