"""From a command to its first result, on the demo's model: against an older commit and against the floor.

    python benchmarks/startup.py                    # after `sh demo/run.sh`; against ae3b67a, 5 rounds
    python benchmarks/startup.py --before HEAD~1 --rounds 9

Each round runs, in turns, the older commit's and this tree's train.sh (to the end of step 1), validation.sh (ten
pictures) and test.py (one picture), and the floor of train.sh: the bare imports after the launcher's. Wall seconds, and
CPU seconds of the whole command, whose ratios hold on a busy machine too. The first round fills caches and is not
counted. Leaves results/startup.md.
"""

import argparse
import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from animals.command import UserError, run

FLOOR = (
    f"{sys.executable} -c 'import torch.distributed.run, accelerate.commands.launch' && "
    f"{sys.executable} -c 'import torch, transformers, trl, deepspeed'"
)


ITEMS = ("interpreters, launcher", "imports, checks, caches", "weights", "trainer", "engine, step 1")


def timed(command, folder, meter):
    """(wall seconds to step 1, else to the end; CPU seconds of everything; wall seconds of ITEMS, else None)"""
    noted = meter.with_name(f"{meter.name}.0.json")
    noted.unlink(missing_ok=True)
    env = os.environ | {"HF_HUB_OFFLINE": "1", "METER": str(meter), "PYTHONPATH": str(ROOT / "benchmarks" / "meter")}
    env["VIRTUAL_ENV"], env["PATH"] = sys.prefix, f"{sys.prefix}/bin:{env['PATH']}"
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    done = subprocess.run(command, shell=True, cwd=folder, env=env, capture_output=True, text=True)
    wall, after = time.time() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise UserError(f"{command}\nended with {done.returncode}: {done.stderr[-2000:]}")
    items = None
    if noted.exists():
        rank = json.loads(noted.read_text())
        marks = [started, *rank["marks"], rank["steps"][0]]
        wall, items = marks[-1] - started, [b - a for a, b in itertools.pairwise(marks)]
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, items


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--before", default="ae3b67a", help="commit to compare with")
    add("--rounds", type=int, default=5, help="rounds that count (default: 5)")
    add("--demo", type=Path, default=ROOT / "temp" / "demo", help="what demo/run.sh left")
    add("--output", type=Path, default=ROOT / "benchmarks" / "results" / "startup.md", help="the table")
    args = parser.parse_args()
    demo, work = args.demo.resolve(), ROOT / "temp" / "startup"
    if not (demo / "model").is_dir():
        raise UserError(f"{demo}: found no model in it; expected what `sh demo/run.sh` leaves; run it first")
    old = work / "before"
    subprocess.run(["git", "worktree", "add", "--force", "--detach", str(old), args.before], cwd=ROOT, check=True)

    one = work / "one"  # a picture a class
    for picture in demo.glob("input/*_data/*/*0.jpg"):
        copy = one / picture.relative_to(demo / "input")
        if not copy.parent.is_dir():
            copy.parent.mkdir(parents=True)
            shutil.copy(picture, copy)
    trained, a_picture = demo / "sft-llava-demo", next(one.glob("validation_data/*/*"))
    of_step_1 = "--max_steps 1 --save_strategy no --per_device_train_batch_size 2 --gradient_accumulation_steps 1"
    model, logs = f"{demo}/model", f"--logging_dir {work}/logs"
    scripts = {  # NAME: before or now
        "train.sh": f"sh train.sh --model_name_or_path {model} --input_dir {demo}/input --temp_dir {work}/cache-NAME "
        f"--output_dir {work}/out-NAME {logs} --eval_strategy no {of_step_1}",
        "validation.sh": f"sh validation.sh --model_name_or_path {trained} --input_dir {one} "
        f"--temp_dir {work}/ten-NAME --report_dir {work}/reports {logs}",
        "test.py": f"{sys.executable} test.py {a_picture} --model_name_or_path {trained} --output {work}/names.csv",
    }
    commands = {
        (script, name): (command.replace("NAME", name), folder)
        for script, command in scripts.items()
        for name, folder in (("before", old), ("now", ROOT))
    }
    commands["train.sh", "floor"] = (FLOOR, ROOT)
    found = {name: [] for name in commands}
    try:
        for i in range(args.rounds + 1):
            for name, (command, folder) in commands.items():
                result = timed(command, folder, work / "meter")
                print(f"round {i} {' '.join(name):22s} wall {result[0]:6.2f} s  CPU {result[1]:6.2f} s", flush=True)
                if i:
                    found[name].append(result)
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(old)], cwd=ROOT, check=True)
    lines = ["| | | wall, s | CPU, s | wall against now | CPU against now |", "|---" * 6 + "|"]
    itemised = [f"| train.sh | {' | '.join(ITEMS)} |", "|---" * (1 + len(ITEMS)) + "|"]
    for (script, name), runs in found.items():
        now = found[script, "now"]
        against = [statistics.median(a[k] / b[k] for a, b in zip(runs, now, strict=True)) for k in (0, 1)]
        wall, cpu = (statistics.median(r[k] for r in runs) for k in (0, 1))
        lines.append(f"| {script} | {name} | {wall:.2f} | {cpu:.2f} | {against[0]:.2f} | {against[1]:.2f} |")
        if runs[0][2]:
            items = [statistics.median(r[2][i] for r in runs) for i in range(len(ITEMS))]
            itemised.append(f"| {name} | {' | '.join(f'{seconds:.2f}' for seconds in items)} |")
    text = (
        f"# From a command to its first result\n\nMade by `python benchmarks/startup.py --before {args.before}` on "
        f"{time.strftime('%Y-%m-%d')}: one CPU rank, the demo's model, medians of {args.rounds} rounds in turns. "
        "train.sh: to the end of step 1; validation.sh: ten pictures; test.py: one.\n\n"
    )
    args.output.write_text(text + "\n".join([*lines, "", "Wall seconds of each part:", "", *itemised]) + "\n")
    print("\n".join([*lines, *itemised]))


if __name__ == "__main__":
    run(main)
