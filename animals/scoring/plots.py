"""What TensorBoard shows of a validation: scalars over the steps, and the confusion matrix as a picture."""

import glob
import os
import time


def confusion_figure(report):
    """The confusion matrix of a report, a matplotlib Figure."""
    import numpy as np
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay

    few = len(report["labels"]) <= 30  # 120 labels have 14,400 cells: drawing their numbers takes too long
    size = 2 + (0.5 if few else 0.2) * len(report["labels"])  # inches
    figure = Figure((size, size), layout="constrained")
    names = [label.replace("$", r"\$") for label in report["labels"]]  # else what is between two $ is a formula
    display = ConfusionMatrixDisplay(np.array(report["confusion_matrix"]), display_labels=names)
    style = {"cmap": "Blues", "colorbar": not few, "xticks_rotation": "vertical", "values_format": "d"}
    display.plot(ax=figure.subplots(), include_values=few, **style)
    display.ax_.set_title(f"accuracy {report['accuracy']:.1%}, n = {report['n']:,}")
    return figure


def log_tensorboard(report, folder):
    """Write the scalars and the picture of one checkpoint, at its step, into the one event file of `folder`.

    Events of other steps in that file stay; those of this step are replaced. All events are written again in the order
    of their steps, because TensorBoard drops what was written before a step that goes back.
    """
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
    from torch.utils.tensorboard import SummaryWriter

    step = report["step"] or 0
    old = sorted(glob.glob(os.path.join(glob.escape(folder), "events.out.tfevents.*")))
    events = [event for path in old for event in LegacyEventFileLoader(path).Load() if event.HasField("summary")]
    events.sort(key=lambda event: event.step)
    with SummaryWriter(folder, filename_suffix=f".{time.time_ns()}") as writer:
        for event in (event for event in events if event.step < step):
            writer.file_writer.add_event(event, walltime=event.wall_time)
        for tag in ("accuracy", "macro_f1", "ece"):
            writer.add_scalar(f"validation/{tag}", report[tag], step)
        writer.add_figure("validation/confusion_matrix", confusion_figure(report), step)
        for event in (event for event in events if event.step > step):
            writer.file_writer.add_event(event, walltime=event.wall_time)
    for path in old:
        os.remove(path)
