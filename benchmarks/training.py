"""Training speed and accuracy, side by side with what a user would run instead. On CPU ranks: only ratios count.

    sh demo/run.sh
    python benchmarks/training.py                          # the rows below in turns, 3 seeds -> results/training.md
    python benchmarks/training.py --rows d dv f g h        # some rows; an interrupted command goes on where it was

a: TRL's own recipe (stock.py): micro-batch 4, random order, no data workers, all tokens are learned, the DeepSpeed
   settings of transformers' documentation
b: a, but only the answer is learned (assistant_only_loss)
b24: b with micro-batch 2 and the parameters in host RAM, for small GPUs
d: train.sh of this tree, micro-batch 8, one learning rate for all parts
dv: d, but the vision tower at a tenth of that rate
e: d in the whole view (scripts/whole_view.py), micro-batch 16
f: d with --train_parts projector --config_file scripts/ddp.yaml, micro-batch 4
g: d with --train_parts attention
h: d with --use_peft --train_parts vision: adapters in the language model, the whole tower at a tenth of their rate

All rows start from the demo's checkpoint after STEPS_BEFORE steps on such pictures in tiles, as the hub's model was
trained in tiles, and after forgetting.py taught it text and captions, whose losses the page gives. They take 64
pictures per step on 2 ranks, with gloo, bf16 and adamw_bnb_8bit; f uses DDP, the others ZeRO-3. The pictures have 2/7
of the sizes of photographs and the model's tiles 2/7 of the 7B's, so that tiles, padding and the mix of lengths are the
7B's. In 640x480 the animals are small (FILLS) and 300x1200 is squeezed to a square, so that the whole view can lose
them. DeepSpeed's size limits are scaled by the decoder layer. Those of a and b would keep most of so small a model, so
they are set to two layers: a weight is then gathered as often (column gathers) as in a deep model.
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
from animals.command import UserError, run
from benchmarks.training_page import BATCH, PIXELS, RANKS, SHAPES, SKIP, report
from config import CHAT_TEMPLATE, FOLDER_TO_LABEL

# The least and the largest share of the shorter side that the animal takes; in the other shapes as in the demo.
FILLS = {(640, 480): (0.35, 0.5), (300, 1200): (0.6, 0.8)}
STEPS_BEFORE = 150  # the demo's checkpoint has seen neither four tiles nor small animals
LAYERS = 147_712, 218_112_000  # elements of a decoder layer: of the tiny model and of the 7B
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
    "d": ("ours", 8, ""),
    "dv": ("ours", 8, "--vision_learning_rate 1e-4"),
    "e": ("ours", 16, ""),  # from the checkpoint in the whole view
    "f": ("ours", 4, "--train_parts projector"),
    "g": ("ours", 8, "--train_parts attention"),
    "h": ("ours", 8, "--use_peft --train_parts vision --vision_learning_rate 1e-4"),
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
    """Make the pictures, the caches of both views, and the two checkpoints that the rows start from."""
    if not (start / "config.json").is_file():
        raise UserError(f"--start {start}: found no config.json; expected a checkpoint; run `sh demo/run.sh` first")
    made = [os.path.getmtime(file) for file in (start / "config.json", ROOT / "benchmarks" / "forgetting.py")]
    wanted = f"{start} {made} {train_pictures} {validation} {FILLS} {STEPS_BEFORE}"
    if (work / "ready").exists() and (work / "ready").read_text() == wanted:
        return
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(start, work / "tiles", ignore=shutil.ignore_patterns("checkpoint-*"))
    draw(work / "input", {"train_data": train_pictures, "validation_data": validation})
    train(work, "d", seed=1000, steps=STEPS_BEFORE)
    shutil.rmtree(work / "tiles")
    os.rename(work / "out", work / "tiles")
    forgetting(work, "teach", "tiles")
    shell(f"{sys.executable} scripts/whole_view.py {work}/tiles {work}/whole")
    fill_cache(work, "whole")
    (work / "ready").write_text(wanted)


def forgetting(work, command, checkpoint):
    return shell(f"{sys.executable} benchmarks/forgetting.py {command} {work}/{checkpoint} {work}/input")


def fill_cache(work, view):
    """Make the cache before a row is timed; it is kept."""
    shell(
        f"{sys.executable} data_process_utils.py --input_dir {work}/input --temp_dir {work}/cache-{view} "
        f"--model_name_or_path {work}/{view}"
    )


def draw(folder, counts):
    """Draw {split: count} pictures of each class, in SHAPES in turns."""
    import make_pictures

    for split, count in counts.items():
        for name, label in FOLDER_TO_LABEL.items():
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                shape = SHAPES[i % len(SHAPES)]
                size = tuple(round(side * 2 / 7) for side in shape)
                stream = random.Random(f"0/{split}/{name}/{i}")
                animal, fills = make_pictures.ANIMALS[label], FILLS.get(shape, (0.8, 0.98))
                picture = make_pictures.picture(*animal, stream, size, fills)
                picture.save(folder / split / name / f"{i:04d}.jpg", quality=92)


def flags_of_train_sh():
    """The flags of train.sh, without those that name places and those that measure or save."""
    lines = re.findall(r'^set -- (.*?) "\$@"', (ROOT / "train.sh").read_text(), re.M)
    words = {shlex.split(line)[0]: line for line in lines}
    places = ("--model_name_or_path", "--output_dir", "--logging_dir", "--per_device_train_batch_size",
              "--gradient_accumulation_steps", "--save_strategy", "--save_steps", "--eval_strategy", "--eval_steps",
              "--eval_on_start", "--report_to", "--logging_steps", "--num_train_epochs", "--learning_rate")  # fmt: skip
    return " ".join(line for flag, line in words.items() if flag not in places)


def write_zero3(work, name):
    """Write the settings of DeepSpeed and accelerate for a row, with sizes scaled from the 7B to the tiny model."""
    stock = ROWS[name][0] == "stock"
    zero3 = DOCUMENTED if stock else json.loads((ROOT / "scripts" / "zero3.json").read_text())
    stage3 = dict(zero3["zero_optimization"])
    for key in ("sub_group_size", "stage3_max_live_parameters", "stage3_max_reuse_distance", "reduce_bucket_size"):
        if stage3[key] != "auto":
            stage3[key] = int(stage3[key] * LAYERS[0] / LAYERS[1])
    if stock:
        stage3 |= {"stage3_max_live_parameters": 2 * LAYERS[0], "stage3_max_reuse_distance": 2 * LAYERS[0]}
    if name == "b24":
        stage3["offload_param"] = {"device": "cpu", "pin_memory": True}
    (work / "zero3.json").write_text(json.dumps(zero3 | {"zero_optimization": stage3}))
    yaml = (ROOT / "scripts" / "deepspeed_zero3.yaml").read_text()
    (work / "zero3.yaml").write_text(re.sub(r"scripts/zero3\.json.*", str(work / "zero3.json"), yaml))


def train(work, name, seed, steps):
    """One run of a row, which leaves work/out. -> the view, by which the checkpoint and the cache are named."""
    whose, micro, flags = ROWS[name]
    view = "whole" if name == "e" else "tiles"
    fill_cache(work, view)  # an instant if it is there
    write_zero3(work, name)
    common = (
        f"--model_name_or_path {work}/{view} --output_dir {work}/out --per_device_train_batch_size {micro} "
        f"--gradient_accumulation_steps {BATCH // RANKS // micro} --max_steps {steps} --seed {seed} --save_strategy no "
        f"--eval_strategy no --report_to none --logging_steps 1000 --learning_rate 1e-3 {flags}"
    )
    environment = {
        "PYTHONPATH": ROOT / "benchmarks" / "meter", "OMP_NUM_THREADS": 1, "DS_ACCELERATOR": "cpu", "TQDM_DISABLE": 1,
        "TORCH_EXTENSIONS_DIR": work / "torch", "HF_DATASETS_CACHE": work / "datasets", "LOCAL_SIZE": RANKS,
        "NUM_PROCESSES": RANKS, "BF16_ON_CPU": 1,  # the engine that a GPU runs, in every row
    }  # fmt: skip
    if whose == "stock":
        lock = work / "torch" / "deepspeed_shm_comm" / "lock"
        lock.unlink(missing_ok=True)  # of a killed run: it would wait for it
        template = CHAT_TEMPLATE.replace("{{ '<s>' }}", "")
        (work / "stock.jinja").write_text(template)
        recipe = "--dtype bfloat16 --bf16 True --optim adamw_bnb_8bit --lr_scheduler_type cosine --weight_decay 0.01"
        shell(
            f"{sys.executable} -m accelerate.commands.launch --config_file {work}/zero3.yaml --num_processes {RANKS} "
            f"--main_process_port 0 benchmarks/stock.py --data {work}/cache-{view}/train.json "
            f"--template {work}/stock.jinja {recipe} --use_cpu True --warmup_steps 0.03 {common}",
            **environment,
        )
        task = json.loads((work / "tiles" / "task.json").read_text())
        task["chat_template"] = template  # it was trained without <s>, so it is asked without it
        (work / "out" / "task.json").write_text(json.dumps(task))
    else:
        settings = "scripts/ddp.yaml" if "projector" in flags else f"{work}/zero3.yaml"
        shell(
            f"{sys.executable} scripts/launch.py --config_file {settings} train.py {flags_of_train_sh()} "
            f"--input_dir {work}/input --temp_dir {work}/cache-{view} --logging_dir {work}/logs "
            f"--vision_learning_rate 1e-3 {common}",
            **environment,
        )
    return view


def read_meter(work):
    """What benchmarks/meter wrote down of a run, put together from all ranks."""
    ranks = [json.loads((work / f"out.meter.{rank}.json").read_text()) for rank in range(RANKS)]
    times = ranks[0]["steps"]
    seconds, pictures = times[-1] - times[SKIP - 1], BATCH * (len(times) - SKIP)
    spans = [(r["moved"][SKIP - 1], r["moved"][-1]) for r in ranks]
    moved = {kind: sum(end[kind] - begin[kind] for begin, end in spans) for kind in spans[0][0]}
    return {
        "samples_per_second": pictures / seconds,
        "cpu_ms": 1e3 * sum(r["cpu"][-1] - r["cpu"][SKIP - 1] for r in ranks) / pictures,
        "waiting": statistics.mean(sum(r["waits"][SKIP:]) for r in ranks) / seconds,
        "padding": sum(sum(r["padding"]) for r in ranks) / sum(sum(r["tokens"]) for r in ranks),
        "gathers": moved["all_gather"] / moved["reduce_scatter"] if moved["reduce_scatter"] else None,  # DDP: none
        "mib": sum(r["mib"] for r in ranks),
    }


def right_by_shape(work, view):
    """validation.py on work/out -> {shape of the picture: [right or wrong, ...]}."""
    shell(
        f"{sys.executable} validation.py --model_name_or_path {work}/out --input_dir {work}/input "
        f"--temp_dir {work}/cache-{view} --report_dir {work}/report --logging_dir {work}/logs "
        "--per_device_eval_batch_size 32"
    )
    found = {f"{w}x{h}": [] for w, h in PIXELS}
    with open(work / "report" / "out" / "predictions.csv", newline="") as file:
        for row in csv.DictReader(file):
            w, h = SHAPES[int(Path(row["image"]).stem) % len(SHAPES)]
            found[f"{w}x{h}"].append(row["correct"] == "True")
    return found


def measure(work, name, seed, steps):
    """Run a row once: read_meter()'s dict, and the share of held-out pictures that are right, in all and by shape."""
    for old in (work / "out", *work.glob("out.meter.*")):
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    right = right_by_shape(work, view := train(work, name, seed, steps))
    return read_meter(work) | {
        "losses": [json.loads(forgetting(work, "measure", model)) for model in (view, "out")],  # before, after
        "micro_batch": ROWS[name][1],
        "accuracy": statistics.mean(map(float, sum(right.values(), []))),
        "by_shape": {shape: statistics.mean(map(float, each)) for shape, each in right.items()},
    }


def in_turns(work, rows, seeds, steps):
    """{name: [a result per seed]}: every row once, then every row again, so that a slower hour slows all of them.

    They are kept in measured.json until all are there: the same command goes on where it was interrupted.
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


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="measure only these")
    add("--seeds", type=int, default=3, help="runs per row (default: 3)")
    add("--steps", type=int, default=16, help="steps of 64 pictures per run (default: 16)")
    add("--train", type=int, default=192, help="pictures per class to train on (default: 192)")
    add("--validation", type=int, default=60, help="held-out pictures per class (default: 60)")
    start = ROOT / "temp" / "demo" / "sft-llava-demo"
    add("--start", type=Path, default=start, help="checkpoint to start from (default: the demo's)")
    add("--work", type=Path, default=ROOT / "temp" / "benchmark", help="scratch folder")
    add("--output", type=Path, default=ROOT / "benchmarks" / "results" / "training.md", help="the table")
    args = parser.parse_args()
    if args.steps <= SKIP or min(args.seeds, args.train) < 1 or args.validation < len(SHAPES):
        raise UserError(
            f"--steps {args.steps} --seeds {args.seeds} --train {args.train} --validation {args.validation}: expected "
            f"more than {SKIP} steps, at least {len(SHAPES)} held-out pictures per class, and at least 1 of the others"
        )
    work, rows = args.work.resolve(), [name for name in ROWS if name in args.rows]
    prepare(work, args.start, args.train, args.validation)
    args.output.write_text(text := report(args, in_turns(work, rows, args.seeds, args.steps)), encoding="utf-8")
    print(text)


if __name__ == "__main__":
    run(main)
