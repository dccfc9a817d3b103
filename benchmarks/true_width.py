"""One training step and one scored picture at the 7B's true width, on CPU, beside what the memory plan says.

    python benchmarks/true_width.py                     # 8 GB of memory, 4 GB of disk; minutes on 2 cores

The hub's config with 1 of 32 decoder layers and 2 of 24 CLIP layers (hidden 4096, vocabulary 32,064, 336 px tiles, the
real tokenizer), random fp16 weights in the hub's files, loaded, trained, saved and scored by train.sh and test.py as
they are: ZeRO-3 on one rank, bf16, 8-bit AdamW. Once with a picture of 1,368 image tokens, once of 2,928, the most
there is. Memory is the training process's anonymous pages (RssAnon, sampled every 20 ms), less those of the same run on
a narrow replica, which are Python's and the libraries'. Writes benchmarks/results/true_width.md; the last line of
stdout is the same as JSON.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")]

import replica  # noqa: E402

from hub_layout import check_weights, read_shards  # noqa: E402

GIB = 2**30
SIZES = {1368: (300, 225), 2928: (672, 672)}  # image tokens -> width, height
LAYERS, VISION_LAYERS = 1, 2


def anonymous(process):
    with open(f"/proc/{process.pid}/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def measure(command, script, marks):
    """Run a command; -> {phase: (peak bytes, seconds)} of the process that runs `script`, and its output.

    marks: phase -> text of the output line that ends it.
    """
    environment = {**os.environ, "NUM_PROCESSES": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    environment |= {"VIRTUAL_ENV": sys.prefix, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}
    running = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    peaks, output, phases = {}, [], list(marks) + ["after"]
    phase, started, seconds = phases[0], time.perf_counter(), {}

    def sample():
        while running.poll() is None:
            try:
                family = [running, *psutil.Process(running.pid).children(recursive=True)]
                for process in family:
                    if script in " ".join(psutil.Process(process.pid).cmdline()[1:3]):
                        peaks[phase] = max(peaks.get(phase, 0), anonymous(process))
            except (psutil.Error, OSError, StopIteration):
                pass
            time.sleep(0.02)

    sampler = threading.Thread(target=sample)
    sampler.start()
    for line in running.stdout:
        output.append(line)
        if phase in marks and marks[phase] in line:
            seconds[phase], started = time.perf_counter() - started, time.perf_counter()
            phase = phases[phases.index(phase) + 1]
    code = running.wait()
    sampler.join()
    seconds["after"] = time.perf_counter() - started
    if code:
        raise SystemExit(f"{' '.join(command)} ended with {code}:\n{''.join(output)[-3000:]}")
    return {name: (peaks.get(name, 0), seconds.get(name, 0)) for name in phases}, "".join(output)


def train(model, pictures, work):
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    flags = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1", "--max_steps", "1"]
    flags += ["--logging_steps", "1", "--save_strategy", "no", "--eval_strategy", "no", "--warmup_ratio", "0"]
    flags += ["--model_name_or_path", str(model), "--input_dir", str(pictures), "--output_dir", str(out)]
    flags += ["--temp_dir", str(work / "cache"), "--logging_dir", str(work / "logs")]
    phases, output = measure(
        ["sh", "train.sh", *flags], "train.py", {"load": "learned tokens between", "step": "'loss'"}
    )
    return phases, next(line for line in output.splitlines() if "'loss'" in line), out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", help="folder for models and outputs (default: a temporary one, removed)")
    parser.add_argument("--results", default=str(ROOT / "benchmarks" / "results"))
    args = parser.parse_args()
    free = psutil.virtual_memory().available / GIB
    if free < 9:
        raise SystemExit(f"found {free:.1f} GiB of free memory; expected 9")
    from memory_plan import RESERVE, load_config, load_zero3, plan

    work = Path(args.work or tempfile.mkdtemp(prefix="true-width-"))
    wide = replica.build(work / "wide", LAYERS, VISION_LAYERS, full_width=True)
    narrow = replica.build(work / "narrow", LAYERS, VISION_LAYERS)
    config, zero3 = load_config(str(wide)), load_zero3(str(ROOT / "scripts" / "zero3.json"))
    shapes, _ = read_shards(wide)
    parameters = sum(int(np.prod(shape)) for shape in shapes.values())
    rows = []
    for tokens, size in SIZES.items():
        pictures = work / f"pictures-{tokens}"
        replica.pictures(pictures, size)
        base, _, _ = train(narrow, pictures, work)
        got, loss, out = train(wide, pictures, work)
        assert check_weights(out) == [] and read_shards(out)[0].keys() == shapes.keys()
        # On CPU what is offloaded stays in the same memory, so the plan without offloading is the one to compare.
        planned = plan(config, zero3, 1, 1, 1, (tokens, tokens), offload_param=False)
        picture = str(pictures / "validation_data" / "cat" / "a.png")
        command = [sys.executable, "test.py", picture, "--output", str(work / "names.csv"), "--model_name_or_path"]
        base_score, _ = measure([*command, str(narrow)], "test.py", {})
        score, _ = measure([*command, str(out)], "test.py", {})
        rows.append(
            {
                "image_tokens": tokens,
                "loss": float(loss.split("'loss': '")[1].split("'")[0]),
                "step_gib": (got["step"][0] - base["step"][0]) / GIB,
                "planned_gib": planned["peaks"]["largest"] - RESERVE,
                "planned_phase": planned["peak_phase"]["largest"],
                "step_seconds": got["step"][1],
                "load_gib": (got["load"][0] - base["load"][0]) / GIB,
                "save_gib": (got["after"][0] - base["after"][0]) / GIB,
                "libraries_gib": base["step"][0] / GIB,
                "score_gib": (score["after"][0] - base_score["after"][0]) / GIB,
                "score_seconds": score["after"][1],
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "deepspeed", "bitsandbytes")
    )
    lines = [
        "# True width: one step of the 7B's geometry on CPU",
        "",
        f"`python benchmarks/true_width.py`: hidden 4096, vocabulary 32,064, {LAYERS} decoder and {VISION_LAYERS} CLIP",
        f"layers, {parameters:,} parameters; one rank of ZeRO-3, bf16 weights, 8-bit AdamW, one picture a step;",
        f"{packages}; {os.cpu_count()} cores.",
        f"GiB beside the {rows[0]['libraries_gib']:.2f} of Python and the libraries (the same run on a narrow replica).",
        "The plan is scripts/memory_plan.py's for this config, one rank, nothing offloaded, without its reserve.",
        "Seconds are those of a shared machine: only their order of size means anything.",
        "",
        "| image tokens | loss | step, measured GiB | step, planned GiB | measured / planned | peak planned in "
        "| load GiB | save GiB | step s | score GiB | score s, start included |",
        "| --: | --: | --: | --: | --: | --- | --: | --: | --: | --: | --: |",
    ]
    lines += [
        f"| {r['image_tokens']:,} | {r['loss']:.2f} | {r['step_gib']:.2f} | {r['planned_gib']:.2f} | "
        f"{r['step_gib'] / r['planned_gib']:.2f} | {r['planned_phase']} | {r['load_gib']:.2f} | {r['save_gib']:.2f} | "
        f"{r['step_seconds']:.0f} | {r['score_gib']:.2f} | {r['score_seconds']:.0f} |"
        for r in rows
    ]
    os.makedirs(args.results, exist_ok=True)
    Path(args.results, "true_width.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    if not args.work:
        shutil.rmtree(work)
    print(json.dumps({"parameters": parameters, "rows": rows}))


if __name__ == "__main__":
    main()
