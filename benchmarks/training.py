"""Training speed and accuracy, side by side with what a user would run instead. On CPU ranks; ratios, not speeds.

    sh demo/run.sh
    python benchmarks/training.py                          # the rows below in turns, 3 seeds -> results/training.md
    python benchmarks/training.py --rows b d --seeds 1     # part of it; an interrupted command goes on where it was

a: the recipe of the first README through TRL's own script (stock.py): micro-batch 4, random order, no workers, all
   tokens supervised, DeepSpeed settings as in transformers' documentation
b: the same with answer-only loss (assistant_only_loss). By memory_plan.py a and b need 26.1 GiB on 4 GPUs, so
b24: what of b fits 24 GiB there: micro-batch 2, parameters in host RAM (20.7 GiB)
c: train.sh of an earlier tree (EARLIER), micro-batch 8, with its own launcher and settings
d: train.sh of this tree, the same micro-batch
e: d with --image_view whole, micro-batch 16
f: d with --train_parts projector --config_file scripts/ddp.yaml, micro-batch 4

Micro-batches are what memory_plan.py lets into 24 GiB for these pictures, 64 a step on 4 GPUs, parameters in host RAM:
16x1 whole at 21.2 GiB, 4x4 of f at 19.5; c and d take 23.9 at 8x2, and 19.6 with
--activation_checkpointing_kwargs '{"offload": true}' (which cannot run here), or 16.8 on 8 GPUs.

All: the demo's checkpoint, trained STEPS_BEFORE steps on such pictures in tiles, as the hub's was on its own; 64
pictures a step on 2 ranks, gloo, bf16, adamw_bnb_8bit; f DDP, the others ZeRO-3. Pictures are drawn at 2/7 of
photographs' sizes and the model's tiles are 2/7 of the 7B's, so tiles, padding and the mix of lengths are the 7B's; in
640x480 the animals are small (FILLS), and 300x1200 is squeezed to a square, so that the whole view can lose them.
DeepSpeed's size limits are scaled by the decoder layer, and stock's, which would keep most of so small a model, to two
layers: a weight is gathered as often (column gathers) as in a model of full depth, where tests/helpers/engine_probe.py
counted 1.96 with zero3.json and 1.87 with stock's.
"""

import argparse
import csv
import json
import os
import random
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]
from animals.checkpoint.tokens import image_token_count
from animals.command import UserError, run
from config import CHAT_TEMPLATE, FOLDER_TO_LABEL

EARLIER = "fff73bf"  # the last commit before animals/
PIXELS = {(300, 225): 8, (300, 200): 3, (225, 300): 3, (300, 300): 3, (640, 480): 2, (300, 1200): 1}  # shape: share
SHAPES = [shape for shape, share in PIXELS.items() for _ in range(share)]  # of the pictures of a class, over and over
# Least and most of the shorter side that the animal takes; in the others as in the demo.
FILLS = {(640, 480): (0.35, 0.5), (300, 1200): (0.6, 0.8)}
STEPS_BEFORE = 150  # in tiles, from the demo's checkpoint: it has seen neither four tiles nor small animals
RANKS, BATCH = 2, 64  # pictures a step
SKIP = 3  # first steps, not counted: allocation, first gathers
LAYERS = 147_712, 218_112_000  # elements of a decoder layer: the tiny model's and the 7B's
DOCUMENTED = {  # transformers' documentation of ZeRO-3, and the key without which DeepSpeed refuses bitsandbytes
    "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "train_batch_size": "auto",
    "gradient_clipping": "auto", "bf16": {"enabled": "auto"}, "zero_allow_untested_optimizer": True,
    "zero_optimization": {
        "stage": 3, "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9,
        "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto", "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9, "stage3_gather_16bit_weights_on_model_save": True,
    },
}  # fmt: skip
ROWS = {  # name: (whose script, micro-batch, flags)
    "a": ("stock", 4, ""),
    "b": ("stock", 4, "--assistant_only_loss True"),
    "b24": ("stock", 2, "--assistant_only_loss True"),
    "c": ("earlier", 8, ""),
    "d": ("ours", 8, ""),
    "e": ("ours", 16, "--image_view whole"),
    "f": ("ours", 4, "--train_parts projector"),
}


def shell(command, folder=ROOT, **environment):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", **{k: str(v) for k, v in environment.items()}}
    for _ in range(3):
        done = subprocess.run(command, shell=True, cwd=folder, env=env, capture_output=True, text=True)
        if "terminate called without an active exception" not in done.stderr:  # torch's, rarely, when a stock run ends
            break
    if done.returncode:
        raise UserError(f"{command}\nended with {done.returncode}: {(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def prepare(work, start, train_pictures, validation):
    """The checkpoint, the pictures, the earlier tree, and the caches of each tree and view."""
    if not (start / "config.json").is_file():
        raise UserError(f"--start {start}: found no config.json; expected a checkpoint; run `sh demo/run.sh` first")
    wanted = f"{start} {os.path.getmtime(start / 'config.json')} {train_pictures} {validation} {FILLS} {STEPS_BEFORE}"
    if (work / "ready").exists() and (work / "ready").read_text() == wanted:
        return
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(start, work / "model", ignore=shutil.ignore_patterns("global_step*", "*.pt", "*.pth"))
    draw(work / "input", {"train_data": train_pictures, "validation_data": validation})
    for view in ("tiles", "whole"):
        fill_cache(work, ROOT, f"cache-{view}", f"--image_view {view}")
    train(work, "d", seed=1000, steps=STEPS_BEFORE)
    shutil.rmtree(work / "model")
    os.rename(work / "out", work / "model")
    (work / "ready").write_text(wanted)


def draw(folder, counts):
    """So many pictures of each class in each split, of SHAPES in turns."""
    import make_pictures

    for split, count in counts.items():
        for name, label in FOLDER_TO_LABEL.items():
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                shape = SHAPES[i % len(SHAPES)]
                size = tuple(round(side * 2 / 7) for side in shape)
                stream = random.Random(f"0/{split}/{name}/{i}")
                picture = make_pictures.picture(
                    *make_pictures.ANIMALS[label], stream, size, FILLS.get(shape, (0.8, 0.98))
                )
                picture.save(folder / split / name / f"{i:04d}.jpg", quality=92)


def fill_cache(work, tree, name, flags=""):
    shell(
        f"{sys.executable} data_process_utils.py --input_dir {work}/input --temp_dir {work}/{name} "
        f"--model_name_or_path {work}/model {flags}",
        tree,
    )


def earlier_tree(work):
    """The folder of EARLIER's files, which is filled once."""
    tree = work / "earlier"
    if not (work / "cache-earlier").is_dir():
        git = ["git", "archive", "--format=tar", f"--output={work}/earlier.tar", EARLIER]
        if subprocess.run(git, cwd=ROOT, capture_output=True).returncode:
            raise UserError(
                f"row c: found no commit {EARLIER} in {ROOT}; expected the history of a git clone that is not shallow; "
                f"git fetch --unshallow, or leave the row out: --rows {' '.join(name for name in ROWS if name != 'c')}"
            )
        shutil.unpack_archive(work / "earlier.tar", tree)
        fill_cache(work, tree, "cache-earlier")
    return tree


def flags_of_train_sh(tree):
    """A tree's train.sh's flags, without those that name places or that measure and save."""
    lines = re.findall(r'^set -- (.*?) "\$@"', (tree / "train.sh").read_text(), re.M)
    words = {shlex.split(line)[0]: line for line in lines}
    places = ("--model_name_or_path", "--output_dir", "--logging_dir", "--per_device_train_batch_size",
              "--gradient_accumulation_steps", "--save_strategy", "--save_steps", "--eval_strategy", "--eval_steps",
              "--eval_on_start", "--report_to", "--logging_steps", "--num_train_epochs", "--learning_rate")  # fmt: skip
    return " ".join(line for flag, line in words.items() if flag not in places)


def write_zero3(work, tree, name):
    """DeepSpeed's and accelerate's settings for a row; sizes scaled from the 7B to the tiny model (docstring)."""
    stock = ROWS[name][0] == "stock"
    zero3 = DOCUMENTED if stock else json.loads((tree / "scripts" / "zero3.json").read_text())
    stage3 = dict(zero3["zero_optimization"])
    for key in ("sub_group_size", "stage3_max_live_parameters", "stage3_max_reuse_distance", "reduce_bucket_size"):
        if stage3[key] != "auto":
            stage3[key] = int(stage3[key] * LAYERS[0] / LAYERS[1])
    if stock:
        stage3 |= {"stage3_max_live_parameters": 2 * LAYERS[0], "stage3_max_reuse_distance": 2 * LAYERS[0]}
    if name == "b24":
        stage3["offload_param"] = {"device": "cpu", "pin_memory": True}
    (work / "zero3.json").write_text(json.dumps(zero3 | {"zero_optimization": stage3}))
    yaml = (tree / "scripts" / "deepspeed_zero3.yaml").read_text()
    (work / "zero3.yaml").write_text(re.sub(r"scripts/zero3\.json.*", str(work / "zero3.json"), yaml))


def train(work, name, seed, steps):
    """One run of a row from the checkpoint to work/out. -> the cache that holds its pictures."""
    whose, micro, flags = ROWS[name]
    tree = earlier_tree(work) if whose == "earlier" else ROOT
    cache = "cache-earlier" if whose == "earlier" else "cache-whole" if "whole" in flags else "cache-tiles"
    write_zero3(work, tree, name)
    common = (
        f"--model_name_or_path {work}/model --output_dir {work}/out --per_device_train_batch_size {micro} "
        f"--gradient_accumulation_steps {BATCH // RANKS // micro} --max_steps {steps} --seed {seed} --save_strategy no "
        f"--eval_strategy no --report_to none --logging_steps 1000 --learning_rate 1e-3 {flags}"
    )
    environment = {
        "METER": work / "meter", "PYTHONPATH": ROOT / "benchmarks" / "meter", "OMP_NUM_THREADS": 1,
        "DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": work / "torch", "HF_DATASETS_CACHE": work / "datasets",
        "NUM_PROCESSES": RANKS, "TQDM_DISABLE": 1, "LOCAL_SIZE": RANKS,
        "CPU_BF16_SPEED": 1,  # bf16 in every row, also where float32 is faster
    }  # fmt: skip
    if whose == "stock":
        (work / "torch" / "deepspeed_shm_comm" / "lock").unlink(missing_ok=True)  # a killed run's, to be waited for
        template = CHAT_TEMPLATE.replace("{{ '<s>' }}", "")
        (work / "stock.jinja").write_text(template)
        recipe = "--dtype bfloat16 --bf16 True --optim adamw_bnb_8bit --lr_scheduler_type cosine --weight_decay 0.01"
        shell(
            f"{sys.executable} -m accelerate.commands.launch --config_file {work}/zero3.yaml --num_processes {RANKS} "
            f"--main_process_port 0 benchmarks/stock.py --data {work}/{cache}/train.json --template {work}/stock.jinja "
            f"{recipe} --use_cpu True --warmup_steps 0.03 {common}",
            **environment,
        )
        task = json.loads((work / "model" / "task.json").read_text())
        task["chat_template"] = template  # it trained without <s>, so it is asked without it
        (work / "out" / "task.json").write_text(json.dumps(task))
    else:
        settings = f"{tree}/scripts/ddp.yaml" if "projector" in flags else f"{work}/zero3.yaml"
        shell(
            f"{sys.executable} scripts/launch.py --config_file {settings} train.py {flags_of_train_sh(tree)} "
            f"--input_dir {work}/input --temp_dir {work}/{cache} --logging_dir {work}/logs {common}",
            tree,
            **environment,
        )
    return cache if whose != "earlier" else "cache-tiles"


def read_meter(work):
    """What benchmarks/meter noted of a run on all ranks."""
    ranks = [json.loads((work / f"meter.{rank}.json").read_text()) for rank in range(RANKS)]
    times = ranks[0]["steps"]
    seconds, pictures = times[-1] - times[SKIP - 1], BATCH * (len(times) - SKIP)
    moved = {
        kind: sum(r["moved"][-1][kind] - r["moved"][SKIP - 1][kind] for r in ranks) for kind in ranks[0]["moved"][0]
    }
    return {
        "samples_per_second": pictures / seconds,
        "cpu_ms": 1e3 * sum(r["cpu"][-1] - r["cpu"][SKIP - 1] for r in ranks) / pictures,
        "waiting": statistics.mean(sum(r["waits"][SKIP:]) for r in ranks) / seconds,
        "padding": sum(sum(r["padding"]) for r in ranks) / sum(sum(r["tokens"]) for r in ranks),
        "gathers": moved["all_gather"] / moved["reduce_scatter"] if moved["reduce_scatter"] else None,  # DDP: none
        "mib": sum(r["mib"] for r in ranks),
    }


def right_by_shape(work, cache):
    """validation.py on work/out -> {shape of the picture: [right or wrong, ...]}."""
    shell(
        f"{sys.executable} validation.py --model_name_or_path {work}/out --input_dir {work}/input "
        f"--temp_dir {work}/{cache} --report_dir {work}/report --logging_dir {work}/logs "
        "--per_device_eval_batch_size 32"
    )
    found = {f"{w}x{h}": [] for w, h in PIXELS}
    with open(work / "report" / "out" / "predictions.csv", newline="") as file:
        for row in csv.DictReader(file):
            w, h = SHAPES[int(Path(row["image"]).stem) % len(SHAPES)]
            found[f"{w}x{h}"].append(row["correct"] == "True")
    return found


def measure(work, name, seed, steps):
    """A row once: read_meter()'s dict, and the share of held-out pictures that are right, in all and by shape."""
    for old in (work / "out", *work.glob("meter.*")):
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    cache = train(work, name, seed, steps)
    right = right_by_shape(work, cache)
    return read_meter(work) | {
        "accuracy": statistics.mean(map(float, sum(right.values(), []))),
        "by_shape": {shape: statistics.mean(map(float, each)) for shape, each in right.items()},
    }


def in_turns(work, rows, seeds, steps):
    """{name: [result a seed]}: every row once, then every row again, so that a slower hour slows all of them.

    Kept in measured.json until all are there: the same command goes on where it was interrupted.
    """
    file, wanted = work / "measured.json", json.dumps([{name: ROWS[name] for name in rows}, seeds, steps])
    kept = json.loads(file.read_text()) if file.exists() else {}
    found = kept["found"] if kept.get("wanted") == wanted else {name: [] for name in rows}
    for seed in range(seeds):
        for name in rows:
            if len(found[name]) > seed:
                continue
            started = time.time()
            result = measure(work, name, seed, steps)
            found[name].append(result)
            file.write_text(json.dumps({"wanted": wanted, "found": found}))
            print(
                f"seed {seed}  {name:4s} {result['samples_per_second']:.1f} samples/s  accuracy "
                f"{result['accuracy']:.3f}  {time.time() - started:.0f} s in all",
                flush=True,
            )
    file.unlink()
    return found


def speed_table(found):
    """Markdown: medians, of samples/s and of its ratios to the neighbours' in each turn; accuracy's mean and spread."""
    bases = [base for base in ("a", "b", "b24", "c") if base in found]
    heads = ["row", "micro x acc.", "samples/s", *(f"against {base}" for base in bases), "CPU ms a picture",
             "waiting for data", "padding", "gathers", "peak MiB, both ranks", "held-out accuracy"]  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, runs in found.items():
        rates = [r["samples_per_second"] for r in runs]
        ratios = [[x / y["samples_per_second"] for x, y in zip(rates, found[b], strict=True)] for b in bases]
        middle = lambda key, runs=runs: statistics.median(r[key] for r in runs)  # noqa: E731
        right, micro = [r["accuracy"] for r in runs], ROWS[name][1]
        cells = [
            name, f"{micro}x{BATCH // RANKS // micro}", f"{statistics.median(rates):.1f}",
            *(f"{statistics.median(each):.2f}" for each in ratios), f"{middle('cpu_ms'):.1f}",
            f"{middle('waiting'):.1%}", f"{middle('padding'):.1%}",
            "-" if runs[0]["gathers"] is None else f"{middle('gathers'):.2f}", f"{middle('mib'):,.0f}",
            f"{statistics.mean(right):.3f} ({min(right):.3f} to {max(right):.3f})",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def shape_table(found, validation):
    """Markdown: accuracy by the held-out pictures' size, mean of the seeds."""
    n = {f"{w}x{h}": 0 for w, h in PIXELS}
    for i in range(validation):
        w, h = SHAPES[i % len(SHAPES)]
        n[f"{w}x{h}"] += len(FOLDER_TO_LABEL)
    lines = [f"| row | {' | '.join(f'{shape} (n = {n[shape]})' for shape in n)} |", "|---" * (1 + len(n)) + "|"]
    for name, runs in found.items():
        means = [statistics.mean(r["by_shape"][shape] for r in runs) for shape in n]
        lines.append(f"| {name} | {' | '.join(f'{mean:.3f}' for mean in means)} |")
    return "\n".join(lines)


def report(args, found):
    """The page: what CPU ranks can and cannot tell, and the two tables."""
    command = " ".join(["python benchmarks/training.py", *sys.argv[1:]])
    tokens = ", ".join(f"{w}x{h} ({image_token_count(w, h):,})" for w, h in PIXELS)
    return (
        f"# Training: measured on {RANKS} CPU ranks\n\nMade by `{command}` on {time.strftime('%Y-%m-%d')}, "
        f"{os.cpu_count()} cores; its docstring says what the rows are. Ratios count, speeds do not. CPU ranks cannot "
        "rank prefetch, overlap, workers, copies or kernels. TRL's loss takes every position on a CPU; here it is made "
        f"to take the answer's alone in all rows, as on a GPU.\n\n{args.seeds} seeds in turns, medians; {args.steps} "
        f"steps of {BATCH} pictures, the first {SKIP} not timed; gathers: elements gathered over elements reduced; "
        f"accuracy on {args.validation * len(FOLDER_TO_LABEL)} held-out pictures, mean (least to most). e sees its "
        "pictures otherwise: its speed is another view's, and the second table says what that costs here. "
        f"Pictures, with the 7B's image tokens: {tokens}; 576 each in the whole view.\n\n{speed_table(found)}\n\n"
        "Held-out accuracy by the pictures' size, mean of the seeds; 640x480 and 300x1200 hold more than the whole "
        f"view's 336x336.\n\n{shape_table(found, args.validation)}\n"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="only these")
    add("--seeds", type=int, default=3, help="runs a row (default: 3)")
    add("--steps", type=int, default=16, help="steps of 64 pictures a run (default: 16)")
    add("--train", type=int, default=192, help="pictures a class to train on (default: 192)")
    add("--validation", type=int, default=60, help="pictures a class held out (default: 60)")
    start = ROOT / "temp" / "demo" / "sft-llava-demo"
    add("--start", type=Path, default=start, help="checkpoint to start from (default: the demo's)")
    add("--work", type=Path, default=ROOT / "temp" / "benchmark", help="scratch folder")
    add("--output", type=Path, default=ROOT / "benchmarks" / "results" / "training.md", help="the table")
    args = parser.parse_args()
    if args.steps <= SKIP or min(args.seeds, args.train) < 1 or args.validation < len(SHAPES):
        raise UserError(
            f"--steps {args.steps} --seeds {args.seeds} --train {args.train} --validation {args.validation}: expected "
            f"more than {SKIP} steps, {len(SHAPES)} or more held out, a class, and 1 or more of the others"
        )
    work, rows = args.work.resolve(), [name for name in ROWS if name in args.rows]
    prepare(work, args.start, args.train, args.validation)
    if "c" in rows:
        earlier_tree(work)  # before anything is timed: says at once if there is no history
    text = report(args, in_turns(work, rows, args.seeds, args.steps))
    args.output.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    run(main)
