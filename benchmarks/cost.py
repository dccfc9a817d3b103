"""Hours an epoch on hardware that is not at hand, computed; and the parts of it that a CPU can check, checked.

    python benchmarks/cost.py                                      # table to benchmarks/results/cost.md
    python benchmarks/cost.py --check                              # also time this machine against the predictions
    python benchmarks/cost.py --link_4090 20 --share_h100 0.5      # every assumption is a flag; --help has its source

Computed: operations a picture (flops.py, counted by torch), bytes a step (scripts/memory_plan.py, at most what
ZeRO-3 gathers and reduces), the largest micro-batch that memory_plan.py lets into the GPU. Assumed: how fast operations
and bytes go. A step takes as long as its operations plus its bytes when nothing overlaps, and as long as the longer of
the two when all of it does; real runs lie between. GPU-to-GPU and host traffic of a 4090 share one PCIe link, so their
times add. Needs config.json, no weights and no GPU. --check holds the operations against
the time of a small model on the real grid.
"""

import argparse
import copy
import functools
import math
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from animals.command import UserError, run
from animals.training import memory as memory_plan
from animals.training.batches import TEXT_TOKENS
from animals.training.memory import MARGIN
from animals.training.parts import PARTS
from benchmarks import flops

CAPPED = [[336, 672], [672, 336]]
LARGEST = {"stock": 2928, "capped": 1752, "whole": 576}  # most image tokens a picture can have in the view
VIEW = {"stock": "tiles", "capped": "tiles, two grids", "whole": "the whole view"}
MACHINES = [("4090", 1, 1), ("4090", 2, 1), ("4090", 4, 1), ("4090", 8, 1), ("4090", 4, 4), ("4090", 8, 4),
            ("H100", 8, 1), ("H100", 8, 4)]  # GPU, GPUs a machine, machines  # fmt: skip
METHODS = {"full": "full", "LoRA, ZeRO-3": "lora", "LoRA, DDP": "lora_ddp", "projector, DDP": "ddp"}  # the plan's name
RECORD = 12_278  # tokens/s: RoundPipe, all weights of Llama-3.1-8B on 4 x 4090; its README, arXiv:2604.27085
ASSUMPTIONS = (
    ("tflops_4090", 165.2, "peak bf16 with fp32 accumulation, NVIDIA Ada GPU architecture white paper"),
    ("share_4090", 0.5, "share of peak reached: LLMQ, arXiv:2512.15306, about 50 % on 4 x 4090"),
    ("memory_4090", 24, "GiB; the plan keeps some of it free"),
    ("link_4090", 10, "GB/s of NCCL a GPU, no P2P, through host memory: NCCL's own table in NVIDIA/nccl-tests#307"),
    ("host_4090", 24, "GB/s between GPU and pinned host memory, PCIe 4.0 x16: the same table"),
    ("network_4090", 10, "GB/s a machine of 4090s: 100 Gbit/s Ethernet, 12.5 on paper, less protocol; a guess"),
    ("tflops_h100", 989.4, "peak dense bf16 of the SXM card, NVIDIA H100 data sheet"),
    ("share_h100", 0.4, "share of peak reached: 38 to 43 % in The Llama 3 Herd of Models, arXiv:2407.21783"),
    ("memory_h100", 79.6, "GiB; 80 GB on the label"),
    ("link_h100", 183, "GB/s of NCCL all-gather over NVLink, 8 GPUs: measured in aigatech/vpbenchmarking"),
    ("host_h100", 54.8, "GB/s from pinned host memory, PCIe 5.0 x16: the same report"),
    ("network_h100", 323, "GB/s of all-gather, 4 machines with 3.2 Tbit/s InfiniBand each: the same report"),
)  # fmt: skip


@functools.cache
def model_config(file, grid):
    config = memory_plan.load_config(file, "whole" if grid == "whole" else "tiles")
    if grid == "capped":
        config.image_grid_pinpoints = CAPPED
    return config


@functools.cache
def picture_cost(file, grid, shape, frozen):
    """(image tokens, FLOPs) of one picture; shape is (width, height)."""
    config = model_config(file, grid)
    tokens = memory_plan.image_tokens(config, shape[1], shape[0])
    return tokens, flops.count(config, tokens + TEXT_TOKENS, memory_plan.tiles_of(config, tokens), frozen=frozen)


@functools.cache
def best_plan(file, grid, tokens, method, gpus, batch, limit):
    """memory_plan.py's plan with the least traffic that fits, or None."""
    config, zero3 = model_config(file, grid), memory_plan.load_zero3(ROOT / "scripts" / "zero3.json")
    parts = ["projector"] if method == "projector, DDP" else list(PARTS)
    sizes = (tokens, max(tokens, LARGEST[grid]))
    plans = memory_plan.rows(config, zero3, gpus, batch, sizes, METHODS[method], 16, parts=parts)
    return memory_plan.recommend(plans, limit)[0]


def step_seconds(plan, gpus, machines, picture_flops, speed):
    """{"compute", "link", "host"}: seconds of one optimizer step for each. speed: see speeds()."""
    pictures = plan["micro_batch"] * plan["accumulation"]  # a GPU
    gbs = min(speed["link"], speed["network"]) if machines > 1 else speed["link"]  # the slowest stretch of the ring
    return {
        "compute": pictures * picture_flops / (speed["tflops"] * speed["share"] * 1e12),
        "link": plan["traffic_gb"]["between_gpus"] / gbs if gpus > 1 else 0.0,
        "host": plan["traffic_gb"]["host"] / speed["host"],
    }


def speeds(args, gpu):
    keys = ("tflops", "share", "memory", "link", "host", "network")
    return {key: getattr(args, f"{key}_{gpu.lower()}") for key in keys}


def epoch(args, grid, shape, method, gpu, gpus, machines):
    """Hours an epoch and what bounds it, as a dict; None where it does not fit."""
    total, speed = gpus * machines, speeds(args, gpu)
    file, frozen = args.model_name_or_path, method != "full"
    tokens, each = picture_cost(file, grid, shape, frozen)
    batch = max(args.effective_batch, total)
    plan = best_plan(file, grid, tokens, method, total, batch, speed["memory"] - MARGIN)
    if plan is None:
        return None
    seconds = step_seconds(plan, total, machines, each, speed)
    moved, steps = seconds["link"] + seconds["host"], math.ceil(args.pictures / batch)
    return {
        "overlapped": steps * max(seconds["compute"], moved) / 3600,
        "apart": steps * (seconds["compute"] + moved) / 3600,
        "bound": "compute" if seconds["compute"] >= moved else "traffic",
        "recipe": f"{plan['micro_batch']}x{plan['accumulation']}{' offl.' if plan['offload_param'] else ''}",
        "tokens": tokens,
        "step": seconds,
        "pictures": batch,
    }  # fmt: skip


def cell(e):
    return f"{e['overlapped']:.2f} - {e['apart']:.2f} {e['bound']} ({e['recipe']})" if e else "does not fit"


def machine_table(args, grid, shape):
    tokens, full = picture_cost(args.model_name_or_path, grid, shape, False)
    _, lora = picture_cost(args.model_name_or_path, grid, shape, True)
    lines = [
        f"### {shape[0]}x{shape[1]} pictures, {VIEW[grid]}: {tokens:,} image tokens, {full / 1e12:.0f} TFLOP a picture "
        f"({lora / 1e12:.0f} with most of it frozen)\n",
        f"| machine | {' | '.join(METHODS)} |",
        "|---|" + "---|" * len(METHODS),
    ]
    for gpu, gpus, machines in MACHINES:
        name = f"{gpus} x {gpu}" if machines == 1 else f"{machines} machines of {gpus} x {gpu}"
        cells = [cell(epoch(args, grid, shape, method, gpu, gpus, machines)) for method in METHODS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def speed_table(args, shape=(300, 225)):
    """Pictures and tokens a second on 4 x 4090, text included, beside the record."""
    lines = ["| what | pictures/s | tokens/s | recipe |", "|---|---|---|---|"]
    for grid in ("stock", "whole"):
        for method in METHODS:
            e = epoch(args, grid, shape, method, "4090", 4, 1)
            if e is None:
                lines.append(f"| {VIEW[grid]}, {method} | does not fit | | |")
                continue
            moved = e["step"]["link"] + e["step"]["host"]
            slow, fast = (e["pictures"] / s for s in (e["step"]["compute"] + moved, max(e["step"]["compute"], moved)))
            tokens = e["tokens"] + TEXT_TOKENS
            lines.append(
                f"| {VIEW[grid]}, {method} | {slow:.1f} - {fast:.1f} | {slow * tokens:,.0f} - {fast * tokens:,.0f} | "
                f"{e['recipe']} |"
            )
    lines.append(f"| RoundPipe, all weights of Llama-3.1-8B, text alone (measured by its authors) | | {RECORD:,} | |")
    return "\n".join(lines)


def growth(args):
    """How the cost grows: with pictures, resolution and GPUs; full fine-tuning."""
    base = epoch(args, "stock", (300, 225), "full", "4090", 4, 1)
    out = ["| what | image tokens | hours an epoch | against 300x225 on 4 x 4090 |", "|---|---|---|---|"]

    def line(what, e):
        ratio = f"{e['overlapped'] / base['overlapped']:.2f} - {e['apart'] / base['apart']:.2f}"
        out.append(f"| {what} | {e['tokens']:,} | {e['overlapped']:.2f} - {e['apart']:.2f} | {ratio} |")

    for factor in (1, 2, 10):
        more = argparse.Namespace(**{**vars(args), "pictures": args.pictures * factor})
        line(f"{more.pictures:,} pictures", epoch(more, "stock", (300, 225), "full", "4090", 4, 1))
    for grid in ("stock", "capped"):
        for shape in ((224, 224), (640, 480), (4000, 3000), (300, 1200)):
            line(f"{shape[0]}x{shape[1]} pixels, {grid} grid", epoch(args, grid, shape, "full", "4090", 4, 1))
    for gpus, machines in ((8, 1), (8, 2), (8, 4), (8, 8)):
        what = f"{gpus * machines} x 4090 on {machines} machine{'s' * (machines > 1)}"
        line(what, epoch(args, "stock", (300, 225), "full", "4090", gpus, machines))
    return "\n".join(out)


def check_tokens(threads, repeats=3):
    """[(what, predicted ratio, measured ratio)]: forward and backward of a small LLaVA-NeXT on the real grid."""
    import torch
    from transformers import LlavaNextForConditionalGeneration

    config = copy.deepcopy(memory_plan.load_config(ROOT / "tests" / "helpers" / "hub_config.json"))
    config.text_config.update({"hidden_size": 512, "intermediate_size": 1792, "num_hidden_layers": 4,
                               "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 128})  # fmt: skip
    config.vision_config.update({"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4,
                                 "num_attention_heads": 4})  # fmt: skip
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = LlavaNextForConditionalGeneration(config).float().train()
    model.activation_checkpointing_enable()
    size = config.vision_config.image_size

    def seconds(shape):
        width, height = shape
        tokens = memory_plan.image_tokens(config, height, width)
        tiles = memory_plan.tiles_of(config, tokens)
        ids = torch.full((1, tokens + TEXT_TOKENS), 5)
        ids[0, 1 : tokens + 1] = config.image_token_id
        pixels = torch.randn(1, tiles, 3, size, size)
        started = time.perf_counter()
        hidden = model.model(
            input_ids=ids, pixel_values=pixels, image_sizes=torch.tensor([[height, width]]), use_cache=False
        ).last_hidden_state
        model.lm_head(hidden[:, -3:]).sum().backward()
        return time.perf_counter() - started

    def predicted(shape):
        tokens = memory_plan.image_tokens(config, shape[1], shape[0])
        return flops.count(config, tokens + TEXT_TOKENS, memory_plan.tiles_of(config, tokens))

    shapes = ((225, 300), (300, 225), (300, 1200), (640, 480))
    for shape in shapes:
        seconds(shape)
    runs = [{shape: seconds(shape) for shape in shapes} for _ in range(repeats)]  # in turns
    out = []
    for shape in shapes[1:]:
        measured = statistics.median(r[shape] / r[shapes[0]] for r in runs)
        tokens = [memory_plan.image_tokens(config, s[1], s[0]) for s in (shape, shapes[0])]
        what = f"time of a picture, {tokens[0]:,} against {tokens[1]:,} image tokens"
        out.append((what, predicted(shape) / predicted(shapes[0]), measured))
    return out


def check(args):
    rows = check_tokens(args.threads)
    lines = ["| ratio | predicted | measured on CPU | off by |", "|---|---|---|---|"]
    for what, predicted, measured in rows:
        lines.append(f"| {what} | {predicted:.2f} | {measured:.2f} | {abs(predicted / measured - 1):.0%} |")
    worst = max(abs(predicted / measured - 1) for _, predicted, measured in rows)
    print(f"worst of {len(rows)} predicted ratios: off by {worst:.0%} (at most 20 % wanted)")
    return "\n".join(lines), worst


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--model_name_or_path",
        default=str(ROOT / "tests" / "helpers" / "hub_config.json"),
        help="config.json (the hub's)",
    )
    add("--pictures", type=int, default=14308, help="pictures an epoch (default: 14308, the data set's)")
    add("--effective_batch", type=int, default=64, help="pictures a step (default: 64 = the README's 4 x 4 x 4)")
    for name, value, source in ASSUMPTIONS:
        add(f"--{name}", type=float, default=value, help=f"{source.replace('%', '%%')} (default: {value:g})")
    add("--check", action="store_true", help="time this machine against the predictions")
    add("--threads", type=int, default=2, help="threads of --check")
    add("--output", default=str(ROOT / "benchmarks" / "results" / "cost.md"), help="the table")
    args = parser.parse_args()
    wrong = [name for name, _, _ in ASSUMPTIONS if getattr(args, name) <= 0]
    if wrong or args.pictures < 1:
        raise UserError(f"--{(wrong or ['pictures'])[0]}: expected a number above 0")
    pictures = ((300, 225), "stock"), ((300, 225), "whole"), ((640, 480), "stock"), ((640, 480), "capped")
    tables = [machine_table(args, grid, shape) for shape, grid in pictures]
    assumed = [f"| `--{name}` | {getattr(args, name):g} | {source} |" for name, _, source in ASSUMPTIONS]
    text = "\n\n".join(
        [
            "# Hours an epoch: computed, not measured",
            "Made by `python benchmarks/cost.py`; no GPU was at hand. Each cell: hours with perfect overlap of "
            "operations and traffic - hours with none, what bounds it, and the recipe (micro-batch x accumulation; "
            "offl.: parameters in host RAM) that scripts/memory_plan.py lets in at the largest picture of the grid. "
            f"{args.pictures:,} pictures, {args.effective_batch} a step.",
            *tables,
            "## Pictures and tokens a second, 4 x 4090, 300x225 pictures",
            speed_table(args),
            "## How it grows (full fine-tuning)",
            growth(args),
            "## Assumed",
            "\n".join(["| flag | value | source |", "|---|---|---|", *assumed]),
        ]
    )
    if args.check:
        table, _ = check(args)
        text += f"\n\n## Held against this machine's CPU ({time.strftime('%Y-%m-%d')})\n\n{table}"
    Path(args.output).write_text(text + "\n", encoding="utf-8")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run(main)
