"""Draw a run's loss and held-out accuracy, as in the README, from its TensorBoard events.

python demo/plot_training.py temp/demo/logs/sft-llava-demo training.png
"""

import argparse
import glob
import os

from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

LEFT = {"train/loss": "loss (answer tokens)", "eval/loss": "held-out loss"}
RIGHT = {"eval/accuracy": "held-out accuracy in training", "validation/accuracy": "held-out accuracy, validation.sh"}


def read_scalars(folder):
    """{tag: [(step, value), ...]} from all event files in and below `folder`, in the order of the steps."""
    found = {}
    for place in sorted({os.path.dirname(p) for p in glob.glob(f"{folder}/**/events.out.tfevents.*", recursive=True)}):
        events = EventAccumulator(place, size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, {}).update({point.step: point.value for point in events.Scalars(tag)})
    return {tag: sorted(points.items()) for tag, points in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="the folder of a run's TensorBoard events")
    parser.add_argument("output", help="the PNG file to write")
    args = parser.parse_args()
    scalars = read_scalars(args.folder)
    if "train/loss" not in scalars:
        parser.error(f"{args.folder}: found {sorted(scalars) or 'no events'}; expected train/loss; train first")
    figure = Figure((8, 4), layout="constrained")
    left = figure.subplots()
    right = left.twinx()
    for axes, tags, colours in ((left, LEFT, ("tab:blue", "tab:cyan")), (right, RIGHT, ("tab:orange", "tab:red"))):
        for (tag, name), colour in zip(tags.items(), colours, strict=True):
            if tag in scalars:
                axes.plot(
                    *zip(*scalars[tag], strict=True), color=colour, label=name, marker="." if axes is right else ""
                )
    left.set(xlabel="optimizer step", ylabel="loss", ylim=(0, None))
    right.set(ylabel="accuracy", ylim=(0, 1))
    left.grid(alpha=0.3)
    lines = [line for axes in (left, right) for line in axes.get_lines()]
    figure.legend(lines, [line.get_label() for line in lines], loc="outside lower center", ncols=2)
    figure.savefig(args.output, dpi=100)


if __name__ == "__main__":
    main()
