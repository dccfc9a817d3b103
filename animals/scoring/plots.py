"""A report's pictures by matplotlib, and the TensorBoard events of a checkpoint: scalars and those pictures."""

import glob
import os
import time

from animals.pictures.read import PictureError, load_picture


def confusion_figure(report):
    import numpy as np
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay

    few = len(report["labels"]) <= 30  # 120 labels have 14,400 cells: their numbers take longer to draw than to find
    size = 2 + (0.5 if few else 0.2) * len(report["labels"])  # inches
    figure = Figure((size, size), layout="constrained")
    display = ConfusionMatrixDisplay(np.array(report["confusion_matrix"]), display_labels=report["labels"])
    look = {"cmap": "Blues", "colorbar": not few, "xticks_rotation": "vertical", "values_format": "d"}
    display.plot(ax=figure.subplots(), include_values=few, **look)
    display.ax_.set_title(f"accuracy {report['accuracy']:.1%}, n = {report['n']:,}")
    return figure


def reliability_figure(report):
    from matplotlib.figure import Figure

    figure = Figure((5, 5), layout="constrained")
    axes = figure.subplots()
    bins = report["calibration"]["bins"]
    certain, accuracy = ([row[key] for row in bins] for key in ("confidence", "accuracy"))
    bars = [[abs(row["accuracy"] - end) for row in bins for end in [row["accuracy_ci95"][k]]] for k in (0, 1)]
    axes.plot([0, 1], [0, 1], "--", color="tab:orange", label="certain as often as right")
    axes.errorbar(certain, accuracy, bars, fmt="o", color="black", ms=4, lw=1, label="pictures in bins, 95 % interval")
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="how certain it was", ylabel="how often it was right")
    noise = report["calibration"]["ece_if_calibrated"]
    axes.set_title(
        f"{report['calibration']['verdict']}: calibration error {report['ece']:.3f}, n = {report['n']:,}\n"
        f"(calibrated: median {noise['median']:.3f}, 99th percentile {noise['percentile_99']:.3f})",
        fontsize=10,
    )
    axes.legend()
    return figure


def mistakes_figure(rows, most=16):
    """The most confident mistakes as one picture, or None."""
    from matplotlib.figure import Figure

    wrong = sorted((row for row in rows if not row["correct"]), key=lambda row: -row["probability"])[:most]
    if not wrong:
        return None
    columns = min(4, len(wrong))
    figure = Figure((2.4 * columns, 2.6 * -(-len(wrong) // columns)), layout="constrained")
    grid = figure.subplots(-(-len(wrong) // columns), columns, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, row in zip(grid, wrong, strict=False):
        try:
            picture = load_picture(row["image"])
        except PictureError:  # removed since it was scored
            continue
        picture.thumbnail((240, 240))
        axes.imshow(picture)
        axes.set_title(f"{row['label']}, called\n{row['prediction']} {row['probability']:.0%}", fontsize=9)
    return figure


def log_tensorboard(report, rows, folder):
    """Scalars and images of one checkpoint at its step into the one event file of `folder`.

    What that file already has for other steps stays, for this step it is replaced, and all is in order of the steps:
    TensorBoard drops what comes before a step that goes back.
    """
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
    from torch.utils.tensorboard import SummaryWriter

    step = report["step"] or 0
    old = sorted(glob.glob(os.path.join(glob.escape(folder), "events.out.tfevents.*")))
    before = [event for path in old for event in LegacyEventFileLoader(path).Load() if event.HasField("summary")]
    before.sort(key=lambda event: event.step)
    with SummaryWriter(folder, filename_suffix=f".{time.time_ns()}") as writer:

        def keep(events):
            for event in events:
                writer.file_writer.add_event(event, walltime=event.wall_time)

        keep(event for event in before if event.step < step)
        for tag in ("accuracy", "macro_f1", "ece"):
            writer.add_scalar(f"validation/{tag}", report[tag], step)
        for rival in report["baselines"]:
            writer.add_scalar(f"validation/rival_{rival['name']}", rival["accuracy"], step)
        for tag, figure in (("confusion_matrix", confusion_figure(report)), ("mistakes", mistakes_figure(rows))):
            if figure:
                writer.add_figure(f"validation/{tag}", figure, step)
        keep(event for event in before if event.step > step)
    for path in old:
        os.remove(path)
