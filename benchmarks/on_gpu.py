"""Measure training and validation on the GPUs of this machine. It downloads nothing. No GPU has run it so far.

    python benchmarks/on_gpu.py                                   # the 7B: all rows need a card of 80 GB
    python benchmarks/on_gpu.py --rows projector                  # fits a card of 24 GB
    python benchmarks/on_gpu.py --rows "tiles, full, 8 x" "tiles, full, 16 x"    # some recipes for all weights
    python benchmarks/on_gpu.py --model_name_or_path temp/demo/model --input_dir temp/demo/input    # on CPU ranks

The model has the hub's real config and tokenizer and seeded random weights (15 GB in --work); the pictures are drawn in
the sizes of photographs. Each row is a `sh train.sh --rehearse`, of the model in tiles and in the whole view: all
weights with every recipe that `sh train.sh --rehearse all` tries (20 on one GPU, minutes each), LoRA and the projector
with the first one. Then the first GPU compares validation.py's scorer with batched generate() of two tokens, the fewest
that an answer needs. Writes benchmarks/results/on_gpu.md.
Needs requirements-dev.txt (mistral-common holds the tokenizer), and for the 7B 55 GB of disk and 64 GB of host RAM.
"""

import argparse
import os
import platform
import random
import shlex
import subprocess
import sys
import time
from importlib.metadata import version
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]
from animals.checkpoint.image_tokens import image_token_count, read_geometry
from animals.checkpoint.load import load_model, load_processor
from animals.command import UserError, run
from animals.pictures.read import list_pictures, load_picture
from animals.ranks import count_gpus
from animals.scoring.scorer import Scorer, score_pictures
from animals.training.recipes import recipes, rehearse, table
from benchmarks.scorer import SHAPES, generate, in_batches
from config import FOLDER_TO_LABEL, Config

ROWS = {  # what trains: (file of accelerate, flags of train.sh)
    "full": ("scripts/deepspeed_zero3.yaml", ""),
    "lora": ("scripts/ddp.yaml", "--use_peft --learning_rate 2e-4"),
    "projector": ("scripts/ddp.yaml", "--train_parts projector --learning_rate 1e-3"),
}
VIEWS = "tiles", "whole"


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
    return dict(zip(VIEWS, (args.model_name_or_path, whole), strict=True))


def training_table(args):
    """For each view the table of `sh train.sh --rehearse all`, with a line per rehearsal."""
    ranks = int(os.environ.get("NUM_PROCESSES", max(1, count_gpus())))
    micro = min(4, max(1, args.effective_batch // ranks))
    accumulation, rows, tables = max(1, args.effective_batch // (micro * ranks)), {}, []
    for view, (name, (file, flags)) in product(VIEWS, ROWS.items()):
        for recipe in recipes(micro, accumulation, file, count_gpus())[: None if name == "full" else 1]:
            rows[f"{view}, {name}, {recipe['name']}"] = f"{flags} {recipe['flags']}"
    chosen = {row: flags for row, flags in rows.items() if any(text in row for text in args.rows)}
    if not chosen:
        raise UserError(f"--rows: found no row with {args.rows} in its name; expected a part of one of {list(rows)}")
    for view, model in views(args).items():
        tried, geometry = [], read_geometry(model)
        for row in (row for row in chosen if row.startswith(view)):
            command = (
                f"sh {ROOT}/train.sh --rehearse --model_name_or_path {model} --input_dir {args.input_dir} --temp_dir "
                f"{args.work}/cache --logging_dir {args.work}/logs --output_dir {args.work}/rehearsed --allow_leaks "
                f"--save_strategy no --eval_strategy no --num_train_epochs 100 {chosen[row]} {args.train_flags}"
            )
            print(f"{row}: {command}", flush=True)
            tried.append({"name": row} | rehearse(shlex.split(command), args.work / "logs" / "rehearsed"))
            print(tried[-1], flush=True)
        if tried:
            sizes = [load_picture(path).size for path in list_pictures(os.path.join(args.input_dir, "train_data"))]
            tokens = sum(image_token_count(*size, geometry) for size in sizes) / len(sizes)
            tables.append(f"```\n{table(tried, micro * accumulation * ranks, tokens)}\n```")
    return "\n\n".join(tables)


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
    add("--rows", nargs="+", default=[""], metavar="TEXT", help="only those rows whose name contains one of these")
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
