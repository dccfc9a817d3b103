"""`sh train.sh --rehearse all`: which recipe trains fastest on this machine? No torch; scripts/launch.py calls it.

All recipes take the same pictures per step. They differ in how many a GPU holds at once, and in what waits in host RAM.
Each is rehearsed for a few steps in processes of its own, without a checkpoint; the fastest one is then rehearsed in
full.
"""

import json
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from animals.checkpoint.steps import delete_old_rehearsal, run_name
from animals.command import UserError
from animals.ranks import end_with_parent

ZERO3 = "deepspeed_zero3.yaml"
ON_GPU = "deepspeed_zero3_gpu.yaml"
OFFLOAD = """--activation_checkpointing_kwargs '{"offload": true}'"""
SHORT = "--rehearse --save_strategy no --eval_strategy no --logging_dir"


def recipes(micro_batch: int, accumulation: int, config_file: str, gpus: int) -> list[dict]:
    """The recipes with the same effective batch: {name, flags}; the one that the flags describe comes first.

    Larger micro-batches gather all weights less often. Parameters and activations in host RAM make room for them.
    """
    found, files = [], {config_file: ""}
    if gpus and Path(config_file).name == ZERO3:  # CPU ranks have no other memory to move things to
        files[str(Path(config_file).with_name(ON_GPU))] = ", parameters on the GPU"
    places = {"": ""} | ({f" {OFFLOAD}": ", activations in host RAM"} if gpus else {})
    pictures = micro_batch * accumulation
    for size in [size for size in range(micro_batch, pictures + 1, micro_batch) if pictures % size == 0]:
        sizes = f"--per_device_train_batch_size {size} --gradient_accumulation_steps {pictures // size}"
        for file, parameters in files.items():
            for flags, activations in places.items():
                name = f"{size} x {pictures // size}{parameters}{activations}"
                found.append({"name": name, "flags": f"--config_file {file} {sizes}{flags}"})
    return found


def rehearse_all(args, config_file, flags, processes, gpus, image_tokens):
    """Rehearse each recipe, print a table and the command of the fastest, and rehearse that one in full.

    args: what the launcher read. flags: all flags of train.py. image_tokens: per picture, on average.
    """
    sizes = args.per_device_train_batch_size or 8, args.gradient_accumulation_steps or 1  # transformers' own defaults
    tried, pictures = recipes(*sizes, config_file, gpus), sizes[0] * sizes[1] * processes
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        with tempfile.TemporaryDirectory() as folder:
            for i, recipe in enumerate(tried):
                print(f"recipe {i + 1} of {len(tried)}: {recipe['name']}", file=sys.stderr, flush=True)
                recipe |= rehearse(flags, f"{recipe['flags']} {SHORT} {shlex.quote(folder)}", folder, args.output_dir)
        done = [recipe for recipe in tried if "seconds_per_step" in recipe]
        print(table(tried, pictures, image_tokens), flush=True)
        if not done:
            raise UserError(
                "--rehearse all: found no recipe that this machine can train; expected one; the lines above say why"
            )
        best = min(done, key=lambda recipe: recipe["seconds_per_step"])
        print(f"\nthe fastest: {best['name']}; its complete rehearsal:", flush=True)
        code = launch(flags, f"{best['flags']} --rehearse").returncode
    finally:
        delete_old_rehearsal(args.output_dir)
    print(f"\n{command(flags, best['flags'])}", flush=True)
    sys.exit(code)


def launch(flags, more, **options):
    """Run the launcher with the flags of train.py and some more, in a process that ends with this one."""
    words = [sys.executable, "scripts/launch.py", "train.py", *flags, *shlex.split(more)]
    return subprocess.run(words, preexec_fn=end_with_parent, **options)


def rehearse(flags, more, folder, output_dir) -> dict:
    """rehearsal.json of one recipe, or {"failed": why}."""
    done = launch(flags, more, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode == 0:
        return json.loads(Path(folder, run_name(output_dir), "rehearsal.json").read_text(encoding="utf-8"))
    said = [line for line in done.stdout.splitlines() if "error" in line.lower()] or done.stdout.splitlines() or [""]
    return {"failed": "out of memory" if "found too little memory" in done.stdout else said[-1]}


def table(tried, pictures, image_tokens) -> str:
    """A line per recipe; GiB of the fullest card, and of the host's RAM while training."""
    head = ("seconds/step", "pictures/s", "image tokens/s", "GiB allocated", "GiB reserved", "GiB of RAM")
    width = max(len(recipe["name"]) for recipe in tried)
    lines = [f"{'recipe':{width}}" + "".join(f"{name:>16}" for name in head)]
    for recipe in tried:
        if "failed" in recipe:
            lines.append(f"{recipe['name']:{width}}    {recipe['failed']}")
            continue
        speed = pictures / recipe["seconds_per_step"]
        cells = [f"{recipe['seconds_per_step']:.2f}", f"{speed:.2f}", f"{speed * image_tokens:,.0f}"]
        for key in ("allocated_gib", "reserved_gib"):
            cells.append(f"{max(gpu[key] for gpu in recipe['gpus']):.1f}" if recipe["gpus"] else "no GPU")
        cells.append(f"{recipe['host_gib']['training']:.1f}")
        lines.append(f"{recipe['name']:{width}}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def command(flags, recipe) -> str:
    """The command line of the run: `sh train.sh`, the flags that the user gave, and those of the recipe."""
    lines = re.findall(r'^set -- (.*) "\$@"', Path("train.sh").read_text(encoding="utf-8"), re.M)
    defaults = [word for line in reversed(lines) for word in shlex.split(line)]
    given = flags[len(defaults) :] if flags[: len(defaults)] == defaults else flags
    words = shlex.join(given)
    return f"sh train.sh {re.sub(r' ?--rehearse[ =]all', '', words)} {recipe}".replace("  ", " ")
