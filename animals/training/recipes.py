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
from itertools import product
from pathlib import Path

from animals.checkpoint.steps import delete_old_rehearsal, run_name
from animals.command import UserError
from animals.ranks import end_with_parent

OFFLOAD = """--activation_checkpointing_kwargs '{"offload": true}'"""


def recipes(micro_batch: int, accumulation: int, config_file: str, gpus: int) -> list[dict]:
    """The recipes with the same effective batch: {name, flags}; the one that the flags describe comes first.

    Larger micro-batches gather all weights less often. Parameters and activations in host RAM make room for them.
    """
    files, places, pictures = {config_file: ""}, {"": ""}, micro_batch * accumulation
    if gpus:  # CPU ranks have no other memory to move things to
        places[f" {OFFLOAD}"] = ", activations in host RAM"
        if Path(config_file).name == "deepspeed_zero3.yaml":
            files[str(Path(config_file).with_name("deepspeed_zero3_gpu.yaml"))] = ", parameters on the GPU"
    sizes, found = [n for n in range(micro_batch, pictures + 1, micro_batch) if pictures % n == 0], []
    for size, (file, parameters), (offload, activations) in product(sizes, files.items(), places.items()):
        cut = f"--per_device_train_batch_size {size} --gradient_accumulation_steps {pictures // size}"
        name = f"{size} x {pictures // size}{parameters}{activations}"
        found.append({"name": name, "flags": f"--config_file {file} {cut}{offload}"})
    return found


def rehearse_all(args, config_file, flags, processes, gpus, image_tokens):
    """Rehearse each recipe, print a table and the command of the fastest, and rehearse that one in full.

    args: what the launcher read. flags: all flags of train.py. image_tokens: per picture, on average.
    """
    sizes = args.per_device_train_batch_size or 8, args.gradient_accumulation_steps or 1  # transformers' own defaults
    tried, pictures = recipes(*sizes, config_file, gpus), sizes[0] * sizes[1] * processes
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    start = [sys.executable, "scripts/launch.py", "train.py", *flags]
    try:
        with tempfile.TemporaryDirectory() as folder:
            short = f"--rehearse --save_strategy no --eval_strategy no --logging_dir {shlex.quote(folder)}"
            for i, recipe in enumerate(tried, 1):
                print(f"recipe {i} of {len(tried)}: {recipe['name']}", file=sys.stderr, flush=True)
                words = [*start, *shlex.split(f"{recipe['flags']} {short}")]
                recipe |= rehearse(words, Path(folder, run_name(args.output_dir)))
        done = [recipe for recipe in tried if "seconds_per_step" in recipe]
        print(table(tried, pictures, image_tokens), flush=True)
        if not done:
            raise UserError("--rehearse all: found no recipe that this machine can train; expected one; see above")
        best = min(done, key=lambda recipe: recipe["seconds_per_step"])
        print(f"\nthe fastest: {best['name']}; its complete rehearsal:", flush=True)
        code, _ = launch([*start, *shlex.split(best["flags"]), "--rehearse"])
    finally:
        delete_old_rehearsal(args.output_dir)
    print(f"\n{command(flags, best['flags'])}", flush=True)
    sys.exit(code)


def launch(words, **options) -> tuple[int, str]:
    """Run the command that these words are -> (exit code, output). It ends with this process."""
    with subprocess.Popen(words, preexec_fn=end_with_parent, **options) as child:
        try:
            output, _ = child.communicate()
        except BaseException:  # a signal: the launcher passes it on to its ranks and waits for them
            child.terminate()
            raise
    return child.returncode, output


def rehearse(words, logs) -> dict:
    """rehearsal.json, from the folder `logs`, of the rehearsal that these words start, or {"failed": why}."""
    code, output = launch(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if code == 0:
        return json.loads(Path(logs, "rehearsal.json").read_text(encoding="utf-8"))
    said = [line for line in output.splitlines() if "error" in line.lower()] or output.splitlines() or [""]
    return {"failed": "out of memory" if "found too little memory" in output else said[-1]}


def table(tried, pictures, image_tokens) -> str:
    """A line per recipe; GiB and allocator retries of the fullest card, and GiB of the host's RAM while training."""
    titles = ("seconds/step", "pictures/s", "image tokens/s", "GiB allocated", "GiB reserved", "retries", "GiB of RAM")
    width = max(len(recipe["name"]) for recipe in tried)
    lines = ["   ".join([f"{'recipe':{width}}", *titles])]
    for recipe in tried:
        if "failed" in recipe:
            lines.append(f"{recipe['name']:{width}}   {recipe['failed']}")
            continue
        seconds = recipe["seconds_per_step"]
        cells = [f"{seconds:.2f}", f"{pictures / seconds:.2f}", f"{pictures / seconds * image_tokens:,.0f}"]
        for key, digits in (("allocated_gib", 1), ("reserved_gib", 1), ("retries", 0)):
            cells.append(f"{max(gpu[key] for gpu in recipe['gpus']):.{digits}f}" if recipe["gpus"] else "no GPU")
        cells.append(f"{recipe['host_gib']['training']:.1f}")
        aligned = [f"{cell:>{len(title)}}" for title, cell in zip(titles, cells, strict=True)]
        lines.append("   ".join([f"{recipe['name']:{width}}", *aligned]))
    return "\n".join(lines)


def command(flags, recipe) -> str:
    """The command line of the run: `sh train.sh`, the flags that the user gave, and those of the recipe."""
    lines = re.findall(r'^set -- (.*) "\$@"', Path("train.sh").read_text(encoding="utf-8"), re.M)
    defaults = [word for line in reversed(lines) for word in shlex.split(line)]
    given = flags[len(defaults) :] if flags[: len(defaults)] == defaults else flags
    return f"sh train.sh {re.sub(r' ?--rehearse[ =]all', '', shlex.join(given))} {recipe}".replace("  ", " ")
