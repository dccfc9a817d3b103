"""`sh demo/run.sh` does what the README says: the model learns, and the mean colour of a picture is not enough."""

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


def test_it_trains_as_the_7b_does(demo):
    """With ZeRO-3, which alone writes such files, and 8-bit AdamW."""
    assert list(demo.checkpoint.glob("checkpoint-*/global_step*/zero_pp_rank_0_mp_rank_00_model_states.pt"))
    assert json.loads((demo.checkpoint / "run.json").read_text())["training"]["optim"] == "adamw_bnb_8bit"


def test_the_summary_says_how_good_it_is(demo, report):
    summary = (demo.root / "summary.txt").read_text()
    assert f"held-out accuracy  {report['accuracy']:.3f}" in summary and "chance 0.10" in summary


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
