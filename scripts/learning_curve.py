"""How many pictures does it take? Accuracy against the number of training pictures, from reports of validation.sh.

    for n in 16 64 128; do
        sh train.sh --examples_per_class $n --max_steps 180 --output_dir sft-$n
        sh validation.sh --model_name_or_path sft-$n
    done
    python scripts/learning_curve.py logs/validation/sft-16 logs/validation/sft-64 logs/validation/sft-128

Draws temp/learning_curve.png (--output): a point with its 95 % interval for each report, and a line through the means
of the runs that have the same number of pictures. Prints the numbers and writes them beside it, in learning_curve.md.
The number of training pictures is `pictures` in the run.json that train.py leaves beside its model.

With the same --max_steps in all runs they differ in their pictures alone; with the same number of epochs, fewer
pictures would also mean fewer steps. Another --seed chooses other pictures: three runs for each number show the spread.
"""

import os
import statistics
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import config as settings
from animals.command import UserError, run
from animals.files import looked_up, printable, read_json, replacing, require_writable
from animals.scoring.metrics import paired
from animals.scoring.report import read_report


def read_points(paths) -> dict[int, list[dict]]:
    """{number of training pictures: the reports of its runs, each with `per_class` and `seed`}, smallest number first.

    Raises UserError if a model's folder has no such run.json, or if reports are about different held-out pictures.
    """
    points, first = {}, None
    for path in paths:
        report, rows = read_report(path)
        first = first or [(row["image"], row["sha256"], row["label"]) for row in rows]
        paired(first, rows, path)
        file = os.path.join(report["model"], "run.json")
        record = read_json(file) if os.path.isfile(file) else {}
        if "pictures" not in record:
            raise UserError(
                f"{looked_up(file)}: found no number of training pictures; expected the run.json that train.py leaves "
                f"beside its model; train that model again, or leave the report {path} out"
            )
        found = {"per_class": record["config"]["examples_per_class"] or "all", "seed": record["training"]["seed"]}
        points.setdefault(record["pictures"], []).append(report | found)
    return dict(sorted(points.items()))


def table(points) -> str:
    """A table in Markdown, a row for each report."""
    lines = [("pictures", "of each class", "seed", "accuracy", "95 % interval", "held-out", "mean accuracy", "model")]
    lines.append(["---"] * len(lines[0]))
    for pictures, group in points.items():
        mean = statistics.mean(p["accuracy"] for p in group)
        for p in sorted(group, key=lambda p: p["seed"]):
            numbers = f"{p['accuracy']:.3f}", "{:.3f} to {:.3f}".format(*p["accuracy_ci95"]), p["n"], f"{mean:.3f}"
            lines.append((pictures, p["per_class"], p["seed"], *numbers, printable(p["model"])))
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def draw(points):
    """The curve, a matplotlib Figure. Runs with the same number of pictures stand a little beside each other."""
    import numpy as np
    from matplotlib.figure import Figure

    figure, means, dots = Figure((6.4, 4), layout="constrained"), [], []
    for pictures, group in points.items():
        means.append(statistics.mean(p["accuracy"] for p in group))
        beside = [pictures * 1.05 ** (i - (len(group) - 1) / 2) for i in range(len(group))]
        dots += [(x, p["accuracy"], *p["accuracy_ci95"]) for x, p in zip(beside, group, strict=True)]
    axes, (x, y, low, high) = figure.subplots(), np.array(dots).T
    axes.errorbar(x, y, [y - low, high - y], fmt="o", ms=4, capsize=2, lw=1, label="one run, 95 % interval")
    axes.plot(points.keys(), means, label="mean of the runs with that number")
    axes.axhline(group[0]["chance"], linestyle=":", color="grey", label="chance")
    about = {"xlabel": "training pictures", "ylabel": f"accuracy on {group[0]['n']} held-out pictures"}
    axes.set(xscale="log", ylim=(0, 1), **about)
    axes.set_xticks(list(points), [f"{pictures:,}" for pictures in points])
    axes.minorticks_off()
    axes.legend()
    return figure


def main():
    parser = settings.parser(__doc__.splitlines()[0], ())
    parser.add_argument("reports", nargs="+", metavar="REPORT", help="the folder of a report that validation.sh wrote")
    parser.add_argument("--output", default="temp/learning_curve.png", help="the plot; beside it is the table, .md")
    args = parser.parse_args()
    base, end = os.path.splitext(args.output)
    if end != ".png":
        raise UserError(f"--output {args.output}: found {end or 'no ending'}; expected a name that ends with .png")
    require_writable("--output", folder := os.path.dirname(args.output) or ".")
    points = read_points(args.reports)
    os.makedirs(folder, exist_ok=True)
    with replacing(args.output, "wb") as file:
        draw(points).savefig(file, format="png")
    with replacing(f"{base}.md") as file:
        file.write(table(points))
    print(f"{table(points)}\n{args.output} shows these numbers, {base}.md holds this table")


if __name__ == "__main__":
    run(main)
