"""Every number against the library that others trust, on tables that include zeros."""

import itertools

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.calibration import calibration_curve
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from animals.command import UserError
from animals.scoring.metrics import calibration, compare, measure, paired, wilson_interval


@pytest.mark.parametrize(("correct", "n"), [(0, 1), (1, 1), (0, 40), (40, 40), (3, 40), (271, 300), (2713, 3000)])
def test_wilson(correct, n):
    assert wilson_interval(correct, n) == pytest.approx(proportion_confint(correct, n, method="wilson"), abs=1e-12)


@pytest.mark.parametrize("counts", list(itertools.product((0, 3, 250), (0, 1, 14), (0, 2, 9), (0, 5))))
def test_comparison(counts):
    both_right, only_this, only_other, both_wrong = counts
    if not sum(counts):
        return
    right = [True] * (both_right + only_this) + [False] * (only_other + both_wrong)
    other = [True] * both_right + [False] * only_this + [True] * only_other + [False] * both_wrong
    c = compare(right, other)
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
            low, high = compare((change > 0).tolist(), (change < 0).tolist())["difference_ci95"]
            held += low <= up - down <= high
        assert held / 600 > 0.93, (n, up, down, held / 600)


def test_calibration_is_scikit_learns():
    random = np.random.default_rng(1)
    confidence = np.concatenate([random.uniform(0.1, 1, 400), [0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0]])
    right = random.uniform(size=len(confidence)) < confidence**2
    ece, bins = calibration(confidence, right)
    accuracy, mean = calibration_curve(right, confidence, n_bins=10)
    full = [row for row in bins if row["n"]]
    assert [row["accuracy"] for row in full] == pytest.approx(accuracy)
    assert [row["confidence"] for row in full] == pytest.approx(mean)
    assert sum(row["n"] for row in bins) == len(right)
    counts = np.array([row["n"] for row in full])
    assert ece == pytest.approx((counts / counts.sum() * np.abs(accuracy - mean)).sum())


def test_certain_and_right_is_calibrated():
    report = measure(["a", "b"], [0, 1, 1], [0, 1, 1], [[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert (report["ece"], report["accuracy"], report["correct"]) == (0.0, 1.0, 3)


def test_other_pictures_are_refused():
    rows = [{"image": "1.jpg", "label": "cat"}, {"image": "2.jpg", "label": "dog"}]
    ours = [("2.jpg", "dog"), ("1.jpg", "cat")]
    assert [row["image"] for row in paired(ours, rows, "x")] == ["2.jpg", "1.jpg"]
    with pytest.raises(
        UserError, match=r"1 not held out here, \['2.jpg'\].*1 of ours lacking, \['3.jpg'\].*the same 2"
    ):
        paired([("3.jpg", "dog"), ("1.jpg", "cat")], rows, "x")
    with pytest.raises(UserError, match="found other labels for 1 pictures, 2.jpg among them"):
        paired([("2.jpg", "cat"), ("1.jpg", "cat")], rows, "x")
