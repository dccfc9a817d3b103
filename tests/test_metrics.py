"""Every number against scikit-learn, scipy or statsmodels, on tables that include zeros."""

import itertools

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.calibration import calibration_curve
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from animals.command import UserError
from animals.scoring import metrics
from animals.scoring.report import read_report
from config import Config


@pytest.mark.parametrize(("correct", "n"), [(0, 1), (1, 1), (0, 40), (40, 40), (3, 40), (271, 300), (2713, 3000)])
def test_wilson(correct, n):
    expected = proportion_confint(correct, n, method="wilson")
    assert metrics.wilson_interval(correct, n) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("counts", list(itertools.product((0, 3, 250), (0, 1, 14), (0, 2, 9), (0, 5))))
def test_comparison(counts):
    both_right, only_this, only_other, both_wrong = counts
    if not sum(counts):
        return
    right = [True] * (both_right + only_this) + [False] * (only_other + both_wrong)
    other = [True] * both_right + [False] * only_this + [True] * only_other + [False] * both_wrong
    c = metrics.compare(right, other)
    assert [c["both_right"], c["only_this"], c["only_other"], c["both_wrong"]] == list(counts)
    table = [[both_right, only_this], [only_other, both_wrong]]
    assert c["mcnemar_p"] == pytest.approx(mcnemar(table, exact=True).pvalue, abs=1e-12)
    per_picture = np.array(right, dtype=float) - np.array(other, dtype=float)
    assert c["difference"] == pytest.approx(per_picture.mean(), abs=1e-12)
    padded = np.append(per_picture, [1, -1])  # Bonett and Price: one picture of each change more
    low, high = norm.interval(0.95, padded.mean(), padded.std() / np.sqrt(len(padded)))
    assert c["difference_ci95"] == pytest.approx([max(-1, low), min(1, high)], abs=1e-12)


def test_the_paired_interval_covers():
    """It must hold the true difference in about 95 % of experiments, also with few pictures and rare changes."""
    random = np.random.default_rng(0)
    for n, up, down in ((40, 0.05, 0.05), (40, 0.3, 0.02), (300, 0.02, 0.0), (300, 0.1, 0.05)):
        held = 0
        for change in random.choice([1, -1, 0], size=(600, n), p=[up, down, 1 - up - down]):
            low, high = metrics.compare((change > 0).tolist(), (change < 0).tolist())["difference_ci95"]
            held += low <= up - down <= high
        assert held / 600 > 0.93, (n, up, down, held / 600)


def test_calibration_is_scikit_learns():
    random = np.random.default_rng(1)
    confidence = np.concatenate([random.uniform(0.1, 1, 400), [0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0]])
    right = random.uniform(size=len(confidence)) < confidence**2
    found = metrics.calibration(confidence, right)
    accuracy, mean = calibration_curve(right, confidence, n_bins=10, strategy="quantile")
    bins = found["bins"]
    assert [row["accuracy"] for row in bins] == pytest.approx(accuracy, abs=1e-12)
    assert [row["confidence"] for row in bins] == pytest.approx(mean, abs=1e-12)
    assert sum(row["n"] for row in bins) == len(right) and {row["n"] for row in bins} <= {40, 41}
    for row in bins:
        inside = (confidence > row["low"] - (row is bins[0])) & (confidence <= row["high"])
        assert row["n"] == inside.sum()
        assert (row["accuracy"], row["confidence"]) == pytest.approx((right[inside].mean(), confidence[inside].mean()))
        assert row["accuracy_ci95"] == pytest.approx(proportion_confint(right[inside].sum(), row["n"], method="wilson"))
    gaps = sum(row["n"] * abs(row["accuracy"] - row["confidence"]) for row in bins) / len(right)
    assert (found["ece"], found["verdict"]) == (pytest.approx(gaps), "over-confident")


def test_what_chance_alone_would_show():
    """One bin of 100 answers at 0.5: |heads - 50| of 100 throws is at most 3 half of the time, above 13 once in 150."""
    found = metrics.calibration([0.5] * 100, [True] * 50 + [False] * 50)
    assert found["ece_if_calibrated"] == pytest.approx({"median": 0.03, "percentile_99": 0.13})
    assert (found["ece"], found["verdict"], found["mean_confidence"]) == (0, "calibrated", 0.5)
    certain, right = [0.6] * 200 + [0.9] * 200, [True] * 180 + [False] * 20 + [True] * 120 + [False] * 80
    assert metrics.calibration(certain, right)["verdict"] == "miscalibrated"  # by 0.3 to either side


def test_equal_certainties_share_a_bin():
    confidence = [0.5] * 50 + [0.9] * 250
    shuffled = np.random.default_rng(0).permutation(300)
    right = np.arange(300) % 3 > 0
    found = metrics.calibration(confidence, right)
    assert [row["n"] for row in found["bins"]] == [50, 250]
    again = metrics.calibration(np.array(confidence)[shuffled], right[shuffled])
    assert again["ece"] == pytest.approx(found["ece"]) and again["verdict"] == "over-confident"


@pytest.mark.parametrize("n", [300, 2862])
def test_a_calibrated_model_is_not_called_anything_else(demo, n):
    """The demo's certainties and certainties around 98 %, outcomes drawn from them; and the demo's at temperature 2."""
    _, rows = read_report(str(demo.root / "logs" / "validation" / "sft-llava-demo"))
    p = np.array([[row[label] for label in Config().labels] for row in rows])
    random = np.random.default_rng(n)
    called = {"demo": 0, "98": 0}
    for _ in range(60):
        for name, c in (("demo", p.max(1)[random.integers(len(p), size=n)]), ("98", random.beta(29.4, 0.6, size=n))):
            called[name] += metrics.calibration(c, random.random(n) < c)["verdict"] != "calibrated"
    assert max(called.values()) <= 4  # of 60; 1 % expected, 5 or more have a chance of 1 in 3,000
    flat = p[random.integers(len(p), size=n)]
    right, flat = random.random(n) < flat.max(1), flat**0.5
    assert metrics.calibration((flat / flat.sum(1, keepdims=True)).max(1), right)["verdict"] == "under-confident"


def test_answered():
    confidence, right = [0.3, 0.8, 0.8, 0.97], [False, True, False, True]
    rows = {row["min_probability"]: (row["share"], row["accuracy"]) for row in metrics.answered(confidence, right)}
    assert rows[0.0] == rows[0.3] == (1, 0.5) and rows[0.31] == rows[0.8] == (0.75, pytest.approx(2 / 3))
    assert rows[0.9] == (0.25, 1) and rows[0.98] == (0, None) and list(rows) == [k / 100 for k in range(100)]


def test_the_interval_of_near_duplicates_covers():
    """Groups of one to five pictures named alike: at n / design effect 95 % hold the truth, at n far fewer."""
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(100), np.arange(100) % 5 + 1)
    effect = metrics.design_effect(groups.tolist())
    assert effect == pytest.approx((20 * (1 + 4 + 9 + 16 + 25)) / 300) and metrics.design_effect(range(9)) == 1
    held = np.zeros(2)
    for _ in range(600):
        correct = int((random.random(100) < 0.8)[groups].sum())
        for k, of in enumerate((effect, 1)):
            low, high = metrics.wilson_interval(correct, len(groups), of)
            held[k] += low <= 0.8 <= high
    assert held[0] / 600 > 0.93 and held[1] / 600 < 0.85
    assert metrics.wilson_interval(240, 300, 2) == pytest.approx(proportion_confint(120, 150, method="wilson"))


def test_duplicates_are_taken_out():
    """30 of 71 pictures are in train too; by hand."""
    pictures, right = [f"{i}.jpg" for i in range(71)], [i % 3 > 0 for i in range(71)]
    group = {picture: i // 2 for i, picture in enumerate(pictures)}
    known = {"identical": {*pictures[:20], "not scored.jpg"}, "near_duplicates": set(pictures[15:30]), "group": group}
    found = metrics.without_duplicates(pictures, right, known)
    assert (found["checked"], found["identical"], found["near_duplicates"], found["groups"]) == (True, 20, 10, 36)
    assert (found["n_without"], found["accuracy_without"]) == (41, sum(right[30:]) / 41)
    effect = (20 * 4 + 1) / 41
    low, high = proportion_confint(sum(right[30:]) / effect, 41 / effect, method="wilson")
    assert found["accuracy_without_ci95"] == pytest.approx([low, high])
    assert metrics.without_duplicates(pictures, right, None) == dict.fromkeys(found) | {"checked": False}
    everything = metrics.without_duplicates(pictures[:3], right[:3], known)
    assert (everything["n_without"], everything["accuracy_without"]) == (0, None)


def test_certain_and_right_is_calibrated():
    report = metrics.measure(["a", "b"], [0, 1, 1], [0, 1, 1], [[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert (report["ece"], report["accuracy"], report["correct"]) == (0.0, 1.0, 3)


def test_pictures_are_paired_by_content():
    rows = [{"image": "a/1.jpg", "sha256": "1", "label": "cat"}, {"image": "2.jpg", "sha256": "2", "label": "dog"}]
    ours = [("./2.jpg", "2", "dog"), ("1.jpg", "1", "cat")]
    assert [row["sha256"] for row in metrics.paired(ours, rows, "x")] == ["2", "1"]
    rows3 = [*rows, {"image": "3.jpg", "sha256": "1", "label": "dog"}]  # the first picture again, with another label
    assert metrics.paired([("p", "1", "dog"), ("q", "1", "cat"), ours[0]], rows3, "x") == [rows3[2], *rows]
    with pytest.raises(UserError, match=r"1 not held out here, \['2.jpg'\].*1 of ours lacking, \['2.jpg'\].*same 2"):
        metrics.paired([("2.jpg", "another", "dog"), ours[1]], rows, "x")
    with pytest.raises(UserError, match="found other labels for 1 pictures, ./2.jpg among them"):
        metrics.paired([("./2.jpg", "2", "cat"), ours[1]], rows, "x")
    with pytest.raises(UserError, match="found no column sha256.*run validation.sh for that checkpoint again"):
        metrics.paired(ours, [{"image": "1.jpg", "label": "cat"}], "x")
