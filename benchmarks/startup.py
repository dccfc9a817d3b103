"""From the command to the first optimizer step, on the demo's model: against an older commit and against the floor.

    python benchmarks/startup.py                    # after `sh demo/run.sh`; against ae3b67a, 5 rounds
    python benchmarks/startup.py --before HEAD~1 --rounds 9

Each round runs, one after the other: train.sh of the older commit, train.sh of this tree, and the floor: the bare
imports after the launcher's. Wall seconds to the end of step 1 and CPU seconds of the whole command, whose ratios hold
on a busy machine too. The first round fills caches and is not counted. Leaves results/startup.md.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from config import UserError, run

FLOOR = (
    f"{sys.executable} -c 'import torch.distributed.run, accelerate.commands.launch' && "
    f"{sys.executable} -c 'import torch, transformers, trl, deepspeed'"
)


def timed(command, folder, meter):
    """(wall seconds to step 1, else to the end; CPU seconds of everything)"""
    meter.with_name(f"{meter.name}.0.json").unlink(missing_ok=True)
    env = os.environ | {"HF_HUB_OFFLINE": "1", "METER": str(meter), "PYTHONPATH": str(ROOT / "benchmarks" / "meter")}
    env["VIRTUAL_ENV"], env["PATH"] = sys.prefix, f"{sys.prefix}/bin:{env['PATH']}"
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    done = subprocess.run(command, shell=True, cwd=folder, env=env, capture_output=True, text=True)
    wall, after = time.time() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise UserError(f"{command}\nended with {done.returncode}: {done.stderr[-2000:]}")
    noted = meter.with_name(f"{meter.name}.0.json")
    if noted.exists():
        wall = json.loads(noted.read_text())["steps"][0] - started
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


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

    def train(name):
        return (
            f"sh train.sh --model_name_or_path {demo}/model --input_dir {demo}/input --temp_dir {work}/cache-{name} "
            f"--output_dir {work}/out-{name} --logging_dir {work}/logs --max_steps 1 --save_strategy no "
            "--eval_strategy no --per_device_train_batch_size 2 --gradient_accumulation_steps 1"
        )

    commands = {"before": (train("before"), old), "now": (train("now"), ROOT), "floor": (FLOOR, ROOT)}
    found = {name: [] for name in commands}
    try:
        for i in range(args.rounds + 1):
            for name, (command, folder) in commands.items():
                result = timed(command, folder, work / "meter")
                print(f"round {i} {name:7s} wall {result[0]:6.2f} s  CPU {result[1]:6.2f} s", flush=True)
                if i:
                    found[name].append(result)
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(old)], cwd=ROOT, check=True)
    lines = ["| | wall to step 1, s | CPU, s | wall against now | CPU against now |", "|---|---|---|---|---|"]
    for name, runs in found.items():
        ratios = [
            statistics.median(a[k] / b[k] for a, b in zip(runs, found["now"], strict=True)) for k in (0, 1)
        ]  # fmt: skip
        middle = [statistics.median(r[k] for r in runs) for k in (0, 1)]
        lines.append(f"| {name} | {middle[0]:.2f} | {middle[1]:.2f} | {ratios[0]:.2f} | {ratios[1]:.2f} |")
    text = (
        f"# From `sh train.sh` to step 1\n\nMade by `python benchmarks/startup.py --before {args.before}` on "
        f"{time.strftime('%Y-%m-%d')}: one CPU rank, the demo's model, medians of {args.rounds} rounds in turns.\n\n"
    )
    args.output.write_text(text + "\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    run(main)
