"""The page that benchmarks/training.py writes, and what it measures on: picture shapes, ranks, pictures per step."""

import os
import statistics
import sys
import time

from animals.checkpoint.image_tokens import image_token_count
from config import FOLDER_TO_LABEL

PIXELS = {(300, 225): 8, (300, 200): 3, (225, 300): 3, (300, 300): 3, (640, 480): 2, (300, 1200): 1}  # shape: share
SHAPES = [shape for shape, share in PIXELS.items() for _ in range(share)]  # the pictures of a class, again and again
RANKS, BATCH = 2, 64  # BATCH: pictures per step
SKIP = 3  # the first steps are not timed: allocation, first gathers


def speed_table(found):
    """Markdown: medians of samples/s and of its ratios to a, b, b24 in each turn; mean and spread of the accuracy."""
    bases = [base for base in ("a", "b", "b24") if base in found]
    heads = ["row", "micro x acc.", "samples/s", *(f"against {base}" for base in bases), "CPU ms per picture",
             "waiting for data", "padding", "gathers", "peak MiB, both ranks", "held-out accuracy",
             "loss on plain text", "loss on captions"]  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, runs in found.items():
        rates = [r["samples_per_second"] for r in runs]
        ratios = [[x / y["samples_per_second"] for x, y in zip(rates, found[b], strict=True)] for b in bases]
        middle = lambda key, runs=runs: statistics.median(r[key] for r in runs)  # noqa: E731
        before, after = ([r["losses"][when] for r in runs] for when in (0, 1))
        right, micro = [r["accuracy"] for r in runs], runs[0]["micro_batch"]
        cells = [
            name, f"{micro}x{BATCH // RANKS // micro}", f"{statistics.median(rates):.1f}",
            *(f"{statistics.median(each):.2f}" for each in ratios), f"{middle('cpu_ms'):.1f}",
            f"{middle('waiting'):.1%}", f"{middle('padding'):.1%}",
            "-" if runs[0]["gathers"] is None else f"{middle('gathers'):.2f}", f"{middle('mib'):,.0f}",
            f"{statistics.mean(right):.3f} ({min(right):.3f} to {max(right):.3f})",
            *(f"{before[0][k]:.2f} -> {statistics.mean(r[k] for r in after):.2f}" for k in ("text", "captions")),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def shape_table(found, validation):
    """Markdown: accuracy by the size of the held-out pictures, mean of the seeds."""
    drawn = [SHAPES[i % len(SHAPES)] for i in range(validation)]
    n = {f"{w}x{h}": drawn.count((w, h)) * len(FOLDER_TO_LABEL) for w, h in PIXELS}
    lines = [f"| row | {' | '.join(f'{shape} (n = {n[shape]})' for shape in n)} |", "|---" * (1 + len(n)) + "|"]
    for name, runs in found.items():
        means = [statistics.mean(r["by_shape"][shape] for r in runs) for shape in n]
        lines.append(f"| {name} | {' | '.join(f'{mean:.3f}' for mean in means)} |")
    return "\n".join(lines)


def report(args, found):
    """The page: what CPU ranks can and cannot tell, and the two tables."""
    command = " ".join(["python benchmarks/training.py", *sys.argv[1:]])
    row_e = "Row e is faster because it sees less of each picture; the second table says what that costs here. "
    tokens = ", ".join(f"{w}x{h} ({image_token_count(w, h):,})" for w, h in PIXELS)
    return (
        f"# Training: measured on {RANKS} CPU ranks\n\nMade by `{command}` on {time.strftime('%Y-%m-%d')}, "
        f"{os.cpu_count()} cores; its docstring says what the rows are. Only ratios count. CPU ranks cannot rank "
        "prefetch, overlap, data workers, copies or kernels. On a CPU TRL computes the loss at every position; here it "
        f"is made to take the answer's alone in all rows, as on a GPU.\n\n{args.seeds} seeds in turns, medians; "
        f"{args.steps} steps of {BATCH} pictures, the first {SKIP} not timed; gathers: elements gathered over elements "
        f"reduced; accuracy on {args.validation * len(FOLDER_TO_LABEL)} held-out pictures, mean (least to most); "
        "losses: before -> after, nats per token, of the text that forgetting.py taught and of captions of held-out "
        f"pictures. {row_e if 'e' in found else ''}"
        f"Pictures, with the 7B's image tokens: {tokens}; 576 each in the whole view.\n\n{speed_table(found)}\n\n"
        "Held-out accuracy by the size of the pictures, mean of the seeds; 640x480 and 300x1200 hold more than the "
        f"whole view's 336x336.\n\n{shape_table(found, args.validation)}\n"
    )
