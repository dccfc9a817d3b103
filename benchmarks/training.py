"""Training speed at equal quality, side by side with what a user would run instead. On CPU ranks; ratios, not speeds.

    sh demo/run.sh
    python benchmarks/training.py                          # the rows below in turns, 3 seeds -> results/training.md
    python benchmarks/training.py --levers                 # each lever on its own against row b
    python benchmarks/training.py --rows b c --seeds 1     # part of it

a: the recipe of the first README through TRL's own script (stock.py): micro-batch 4, random order, no workers, all
   tokens supervised, DeepSpeed settings as in transformers' documentation
b: the same with answer-only loss (assistant_only_loss). By memory_plan.py a and b need 27.5 GiB on 4 GPUs, so
b24: what of b fits 24 GiB there: micro-batch 2, parameters in host RAM (20.7 GiB)
c: ours: train.sh's flags with micro-batch 8: what memory_plan.py lets into 24 GiB for these shapes on 8 GPUs (17.0 GiB
   at the largest micro-batch), or on 4 with --activation_checkpointing_kwargs '{"offload": true}' (19.8 GiB; the
   offload itself cannot run here); without it 4 GPUs need 24.1 GiB and take micro-batch 4 (19.9): the lever
   batch_rebalance
All: the demo's half-trained checkpoint, 64 pictures a step, 2-rank ZeRO-3 over gloo, bf16, adamw_bnb_8bit. Pictures are
drawn at 2/7 of photographs' sizes and the model's tiles are 2/7 of the 7B's, so tiles, padding and the mix of lengths
are the 7B's. DeepSpeed's size limits are scaled by the decoder layer, and stock's, which would keep most of so small a
model, to two layers: a weight is gathered as often (column gathers) as in a model of full depth, where
tests/helpers/engine_probe.py counted 1.96 with zero3.json and 1.87 with stock's.
Leaves results/{training,levers}.md and training.json (which cost.py --check reads).
"""

import argparse
import json
import os
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
from animals.pictures import read as pictures
from config import FOLDER_TO_LABEL

PIXELS = {(300, 225): 8, (300, 200): 3, (225, 300): 3, (300, 300): 3, (640, 480): 2, (300, 1200): 1}  # shape: share
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
BALANCED = "--train_sampling_strategy batch_rebalance"
# name: (script, micro-batch, flags, changes to zero_optimization)
ROWS = {
    "a": ("stock", 4, "", {}),
    "b": ("stock", 4, "--assistant_only_loss True", {}),
    "b24": ("stock", 2, "--assistant_only_loss True", {"offload_param": {"device": "cpu", "pin_memory": True}}),
    "c": ("ours", 8, BALANCED, {}),
}
LEVERS = {
    "train.py with b's settings": ("ours", 4, "", {}),
    "micro-batch 2": ("ours", 2, "", {}),
    "micro-batch 8": ("ours", 8, "", {}),
    "micro-batch 16": ("ours", 16, "", {}),
    "group_by_length": ("ours", 4, "--train_sampling_strategy group_by_length", {}),
    "batch_rebalance": ("ours", 4, BALANCED, {}),
    "1 worker a rank, 2 batches ahead": ("ours", 4, "--dataloader_num_workers 1 --dataloader_prefetch_factor 2", {}),
    "no checkpointing": ("ours", 4, "--no_gradient_checkpointing", {}),
    "checkpointing every 2nd layer": ("ours", 4, """--activation_checkpointing_kwargs '{"every_n_layers": 2}'""", {}),
    "overlap_comm off": ("ours", 4, "", {"overlap_comm": False}),
    "stage3_max_reuse_distance 0": ("ours", 4, "", {"stage3_max_reuse_distance": 0}),
    "reduce_bucket_size auto": ("ours", 4, "", {"reduce_bucket_size": "auto"}),
    "parameters not offloaded": ("ours", 4, "", {"offload_param": {"device": "none"}}),
    "capped grid": ("ours", 4, "", {}),
}


def flags_of_train_sh():
    """train.sh's flags, without those that name places."""
    lines = re.findall(r'^set -- (.*?) "\$@"', (ROOT / "train.sh").read_text(), re.M)
    words = {shlex.split(line)[0]: line for line in lines}
    places = ("--model_name_or_path", "--output_dir", "--logging_dir", "--per_device_train_batch_size",
              "--gradient_accumulation_steps", "--save_strategy", "--save_steps", "--eval_strategy", "--eval_steps",
              "--report_to", "--logging_steps", "--num_train_epochs", "--learning_rate",
              "--train_sampling_strategy")  # fmt: skip
    return " ".join(line for flag, line in words.items() if flag not in places)


def prepare(work, start, train, validation):
    """Pictures, their cache, and the checkpoint with the stock and with the capped grid."""
    if (work / "ready").exists() and (work / "ready").read_text() == f"{start} {train} {validation}":
        return
    import random

    import make_pictures

    shutil.rmtree(work, ignore_errors=True)
    make_pictures.SIZES = [(round(w * 2 / 7), round(h * 2 / 7)) for (w, h), n in PIXELS.items() for _ in range(n)]
    for split, count in (("train_data", train), ("validation_data", validation)):
        for folder, label in FOLDER_TO_LABEL.items():
            (work / "input" / split / folder).mkdir(parents=True)
            for i in range(count):
                r = random.Random(f"0/{split}/{folder}/{i}")
                picture = make_pictures.picture(*make_pictures.ANIMALS[label], r)
                picture.save(work / "input" / split / folder / f"{i:04d}.jpg", quality=92)
    if not (start / "config.json").is_file():
        raise UserError(f"--start {start}: found no config.json; expected a checkpoint; run `sh demo/run.sh` first")
    for name in ("model", "capped"):
        shutil.copytree(start, work / name, ignore=shutil.ignore_patterns("global_step*", "*.pt", "*.pth"))
    for file in (work / "capped").glob("*config.json"):
        content = json.loads(file.read_text())
        if "image_grid_pinpoints" in content:
            content["image_grid_pinpoints"] = content["image_grid_pinpoints"][:2]
            file.write_text(json.dumps(content))
    for name in ("model", "capped"):
        shell(
            f"{sys.executable} -c 'import sys, config; from animals.pictures.prepare import prepare; "
            f'prepare(config.Config(input_dir="{work}/input", temp_dir="{work}/cache-{name}"), '
            f'model_name_or_path="{work}/{name}")\''
        )
    (work / "ready").write_text(f"{start} {train} {validation}")


def shell(command, **environment):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", **{k: str(v) for k, v in environment.items()}}
    for _ in range(3):
        done = subprocess.run(command, shell=True, cwd=ROOT, env=env, capture_output=True, text=True)
        if "terminate called without an active exception" not in done.stderr:  # torch's, rarely, when a stock run ends
            break
    if done.returncode:
        raise UserError(f"{command}\nended with {done.returncode}: {(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def write_zero3(work, script, changes):
    """DeepSpeed's and accelerate's settings for a run; sizes scaled from the 7B to the tiny model (docstring)."""
    zero3 = json.loads((ROOT / "scripts" / "zero3.json").read_text()) if script == "ours" else DOCUMENTED
    stage3 = zero3["zero_optimization"] | changes
    for key in ("sub_group_size", "stage3_max_live_parameters", "stage3_max_reuse_distance", "reduce_bucket_size"):
        if stage3[key] != "auto":
            stage3[key] = int(stage3[key] * LAYERS[0] / LAYERS[1])
    if script == "stock":
        stage3 |= {"stage3_max_live_parameters": 2 * LAYERS[0], "stage3_max_reuse_distance": 2 * LAYERS[0]}
    (work / "zero3.json").write_text(json.dumps(zero3 | {"zero_optimization": stage3}))
    yaml = (ROOT / "scripts" / "deepspeed_zero3.yaml").read_text()
    (work / "zero3.yaml").write_text(re.sub(r"scripts/zero3\.json.*", str(work / "zero3.json"), yaml))


def measure(work, name, row, seed, steps):
    """One run from the checkpoint: a dict of samples/s, waiting and padding shares, MiB, accuracy, start-up seconds."""
    script, micro, flags, changes = row
    out, meter = work / "out", work / "meter"
    for old in (out, *work.glob("meter.*")):
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    (work / "torch" / "deepspeed_shm_comm" / "lock").unlink(missing_ok=True)  # of a killed run: stock would wait for it
    write_zero3(work, script, changes)
    model = "capped" if name == "capped grid" else "model"
    data = f"--input_dir {work}/input --temp_dir {work}/cache-{model}"
    common = (
        f"--model_name_or_path {work}/{model} --output_dir {out} --per_device_train_batch_size {micro} "
        f"--gradient_accumulation_steps {BATCH // RANKS // micro} --max_steps {steps} --seed {seed} --save_strategy no "
        f"--eval_strategy no --report_to none --logging_steps 1000 --learning_rate 1e-3 {flags}"
    )
    environment = {
        "METER": meter, "PYTHONPATH": ROOT / "benchmarks" / "meter", "OMP_NUM_THREADS": 1, "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": work / "torch", "HF_DATASETS_CACHE": work / "datasets",
        "NUM_PROCESSES": RANKS, "TQDM_DISABLE": 1, "LOCAL_SIZE": RANKS,
    }  # fmt: skip
    started = time.time()
    if script == "ours":
        shell(
            f"{sys.executable} scripts/launch.py --config_file {work}/zero3.yaml train.py {flags_of_train_sh()} "
            f"{data} --logging_dir {work}/logs {common}",
            **environment,
        )
    else:
        recipe = "--dtype bfloat16 --bf16 True --optim adamw_bnb_8bit --lr_scheduler_type cosine --weight_decay 0.01"
        shell(
            f"{sys.executable} -m accelerate.commands.launch --config_file {work}/zero3.yaml --num_processes {RANKS} "
            f"--main_process_port 0 benchmarks/stock.py --data {work}/cache-{model}/train.json {recipe} "
            f"--use_cpu True --warmup_steps 0.03 {common}",
            **environment,
        )
    ranks = [json.loads(Path(f"{meter}.{rank}.json").read_text()) for rank in range(RANKS)]
    times = ranks[0]["steps"]
    seconds = times[-1] - times[SKIP - 1]
    moved = {
        kind: sum(r["moved"][-1][kind] - r["moved"][SKIP - 1][kind] for r in ranks) for kind in ranks[0]["moved"][0]
    }
    result = {
        "samples_per_second": BATCH * (len(times) - SKIP) / seconds,
        "cpu_ms": 1e3 * sum(r["cpu"][-1] - r["cpu"][SKIP - 1] for r in ranks) / (BATCH * (len(times) - SKIP)),
        "waiting": statistics.mean(sum(r["waits"][SKIP:]) for r in ranks) / seconds,
        "padding": sum(sum(r["padding"]) for r in ranks) / sum(sum(r["tokens"]) for r in ranks),
        "gathers": moved["all_gather"] / moved["reduce_scatter"],
        "mib": sum(r["mib"] + (r["worker_mib"] if "num_workers" in flags else 0) for r in ranks),
        "to_step_1": times[0] - started,
    }
    # What TRL trained without <s> is asked without it.
    template = ".replace(\"{{ '<s>' }}\", '')" if script == "stock" else ""
    code = f"import config; config.CHAT_TEMPLATE = config.CHAT_TEMPLATE{template}; import validation as v; v.main()"
    told = shell(
        f"{sys.executable} -c {shlex.quote(code)} --model_name_or_path {out} {data} --report_dir {work}/report "
        f"--logging_dir {work}/logs --per_device_eval_batch_size 32"
    )
    result["accuracy"] = json.loads(told.strip().splitlines()[-1])["accuracy"]
    return result


def in_turns(work, rows, seeds, steps):
    """{name: [result a seed]}: every row once, then every row again, so that a slower hour slows all of them.

    Kept in measured.json until all are there: the same command goes on where it was interrupted.
    """
    file, wanted = work / "measured.json", json.dumps([rows, seeds, steps])
    kept = json.loads(file.read_text()) if file.exists() else {}
    found = kept["found"] if kept.get("wanted") == wanted else {name: [] for name in rows}
    for seed in range(seeds):
        for name, row in rows.items():
            if len(found[name]) > seed:
                continue
            found[name].append(measure(work, name, row, seed, steps))
            file.write_text(json.dumps({"wanted": wanted, "found": found}))
            r = found[name][-1]
            ratio = r["samples_per_second"] / found["b"][-1]["samples_per_second"] if found.get("b") else 1
            print(
                f"seed {seed}  {name:34s}" + "  ".join(f"{k} {v:.3f}" for k, v in r.items()) + f"  x{ratio:.2f}",
                flush=True,
            )
    file.unlink()
    return found


def ratios(found, name, base):
    return [x["samples_per_second"] / y["samples_per_second"] for x, y in zip(found[name], found[base], strict=True)]


def table(found, rows, bases):
    """Markdown: median of samples/s and of the ratios of neighbours, mean and spread (max - min) of accuracy."""
    out = ["| row | micro x acc. | samples/s | " + " | ".join(f"against {b}" for b in bases)
           + " | CPU ms a picture | waiting for data | padding | gathers | peak MiB, both ranks | held-out accuracy |",
           "|---" * (9 + len(bases)) + "|"]  # fmt: skip
    for name, runs in found.items():
        middle = lambda key, runs=runs: statistics.median(r[key] for r in runs)  # noqa: E731
        against = [f"{statistics.median(ratios(found, name, b)):.2f}" for b in bases]
        right = [r["accuracy"] for r in runs if "accuracy" in r]
        accuracy = f"{statistics.mean(right):.3f} ({min(right):.3f} to {max(right):.3f})" if right else ""
        micro, rate = rows[name][1], middle("samples_per_second")
        out.append(
            f"| {name} | {micro}x{BATCH // RANKS // micro} | {rate:.1f} | {' | '.join(against)} "
            f"| {middle('cpu_ms'):.1f} | {middle('waiting'):.1%} "
            f"| {middle('padding'):.1%} | {middle('gathers'):.2f} | {middle('mib'):,.0f} | {accuracy} |"
        )
    return "\n".join(out)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--levers", action="store_true", help="each lever against row b instead of a, b and c")
    add("--rows", nargs="*", help="only these")
    add("--seeds", type=int, default=3, help="runs a row (default: 3)")
    add("--steps", type=int, default=30, help="steps of 64 pictures a run (default: 30)")
    add("--train", type=int, default=192, help="pictures a class to train on (default: 192)")
    add("--validation", type=int, default=40, help="pictures a class held out (default: 40)")
    start = ROOT / "temp" / "demo" / "sft-llava-demo" / "checkpoint-200"
    add("--start", type=Path, default=start, help="checkpoint to start from (default: the demo's, half trained)")
    add("--work", type=Path, default=ROOT / "temp" / "benchmark", help="scratch folder")
    add("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the tables")
    args = parser.parse_args()
    everything = {"b": ROWS["b"], **LEVERS} if args.levers else ROWS
    unknown = set(args.rows or ()) - set(everything)
    if unknown or args.steps <= SKIP or args.seeds < 1:
        raise UserError(f"found rows {sorted(unknown)}, --steps {args.steps}, --seeds {args.seeds}; expected rows of "
                        f"{list(everything)}, more than {SKIP} steps and a seed")  # fmt: skip
    rows = {name: row for name, row in everything.items() if not args.rows or name in args.rows}
    work = args.work.resolve()
    prepare(work, args.start, args.train, args.validation)
    bases = [base for base in ("a", "b", "b24") if base in rows]
    found = in_turns(work, rows, args.seeds, args.steps)
    write(args, found, rows, bases)


def large_jpeg(processor, rounds=7):
    """Milliseconds from a 4000x3000 JPEG to the model's input at the 7B's tiles: decoded whole, and as we do."""
    import numpy
    from PIL import Image
    from transformers import AutoProcessor

    prepare = AutoProcessor.from_pretrained(processor).image_processor
    tile = {"height": 336, "width": 336}
    grid = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    noise = numpy.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=numpy.uint8)
    file = processor.parent / "large.jpg"
    Image.fromarray(noise).resize((4000, 3000)).save(file, quality=92)

    def milliseconds(enough):
        started = time.perf_counter()
        picture, _ = pictures._load(file, enough=enough)
        prepare(picture, size={"shortest_edge": 336}, crop_size=tile, image_grid_pinpoints=grid, return_tensors="pt")
        return 1e3 * (time.perf_counter() - started)

    pairs = [(milliseconds(None), milliseconds(pictures.ENOUGH)) for _ in range(rounds)]
    whole, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
    return f"A 4000x3000 JPEG, decoded and cut into tiles: {whole:.0f} ms whole, {ours:.0f} ms at half its size.\n"


def write(args, found, rows, bases):
    """The tables, and training.json with what cost.py --check needs added to what is there."""
    name = "levers" if args.levers else "training"
    tokens = ", ".join(f"{w}x{h} ({image_token_count(w, h):,})" for w, h in PIXELS)
    command = f"python {' '.join(['benchmarks/training.py', *sys.argv[1:]])}"
    held_out = args.validation * len(FOLDER_TO_LABEL)
    text = (
        f"# {name.capitalize()}: measured on {RANKS} CPU ranks\n\nMade by `{command}` on {time.strftime('%Y-%m-%d')}, "
        f"{os.cpu_count()} cores. Ratios count, speeds do not. {args.seeds} seeds in turns, medians; {args.steps} "
        f"steps of {BATCH} pictures, the first {SKIP} not timed; gathers: elements gathered over elements reduced; "
        f"accuracy on {held_out} held-out pictures, mean (least to most). Pictures, with the 7B's image tokens: "
        f"{tokens}.\n\n{table(found, rows, bases)}\n"
    )
    if args.levers:
        text += f"\n{large_jpeg(args.work.resolve() / 'model')}"
    args.output.mkdir(exist_ok=True)
    (args.output / f"{name}.md").write_text(text, encoding="utf-8")
    file = args.output / "training.json"
    kept = json.loads(file.read_text()) if file.exists() else {}
    kept[name] = found
    if args.levers:
        plain = {"train.py with b's settings": 4, "micro-batch 2": 2, "micro-batch 8": 8, "micro-batch 16": 16}
        kept["micro_batches"] = {
            f"{m}x{BATCH // RANKS // m}": statistics.median(r["samples_per_second"] for r in found[row])
            for row, m in plain.items()
            if row in found
        }
    file.write_text(json.dumps(kept, indent=1))
    print(text)


if __name__ == "__main__":
    run(main)
