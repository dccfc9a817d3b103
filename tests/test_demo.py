"""`sh demo/run.sh` does what the README says: it learns, and not from the mean colour."""

import csv
import json

import numpy
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def report(demo):
    return json.loads((demo.root / "logs" / "validation" / "sft-llava-demo" / "report.json").read_text())


def test_it_learns(report):
    assert report["n"] >= 200 and report["chance"] == 0.1
    assert report["accuracy"] >= 0.85


def test_the_loss_falls_and_tensorboard_has_it(demo):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (demo.root / "logs" / "sft-llava-demo").glob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events)).Reload()
    loss = [event.value for event in accumulator.Scalars("train/loss")]
    assert numpy.mean(loss[-3:]) < 0.3 * loss[0]


def test_the_console_says_what_ran(demo, report):
    if demo.output is None:
        pytest.skip("--reuse-demo: its output was not kept")
    assert "DeepSpeed ZeRO stage 3" in demo.output and "adamw_bnb_8bit" in demo.output
    assert f"held-out accuracy  {report['accuracy']:.3f}" in demo.output and "chance 0.10" in demo.output


def test_unlabelled_pictures_are_named(demo):
    with open(demo.root / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows and all(row["prediction"] and not row["error"] for row in rows)


def test_mean_colour_is_not_enough(demo):
    """A nearest-centroid classifier on the mean colour, fitted on the training pictures."""

    def colours(split):
        paths = sorted((demo.input / split).glob("*/*"))
        assert paths
        return [p.parent.name for p in paths], numpy.array(
            [numpy.asarray(Image.open(p).convert("RGB")).reshape(-1, 3).mean(0) for p in paths]
        )

    names, train = colours("train_data")
    classes = sorted(set(names))
    centroids = numpy.array([train[[n == c for n in names]].mean(0) for c in classes])
    truth, held_out = colours("validation_data")
    nearest = numpy.linalg.norm(held_out[:, None] - centroids, axis=2).argmin(1)
    assert numpy.mean([classes[i] == t for i, t in zip(nearest, truth, strict=True)]) < 0.35
