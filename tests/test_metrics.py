"""Every number against scikit-learn, scipy or statsmodels, on tables that include zeros."""

import functools
import itertools

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.calibration import calibration_curve
from sklearn.metrics import f1_score
from statsmodels.stats.proportion import proportion_confint

from animals.command import UserError
from animals.scoring import metrics
from animals.scoring.page import show
from animals.scoring.report import read_report
from config import Config


@pytest.mark.parametrize(("correct", "n"), [(0, 1), (1, 1), (0, 40), (40, 40), (3, 40), (271, 300), (2713, 3000)])
def test_wilson(correct, n):
    expected = proportion_confint(correct, n, method="wilson")
    assert metrics.wilson_interval(correct, n) == pytest.approx(expected, abs=1e-12)
    expected = proportion_confint(correct / 2, n / 2, method="wilson")
    assert metrics.wilson_interval(correct, n, 2) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("counts", list(itertools.product((0, 3, 250), (0, 1, 14), (0, 2, 9), (0, 5))))
def test_comparison(counts):
    both_right, only_this, only_other, both_wrong = counts
    if not sum(counts):
        return
    right = [True] * (both_right + only_this) + [False] * (only_other + both_wrong)
    other = [True] * both_right + [False] * only_this + [True] * only_other + [False] * both_wrong
    c = metrics.compare(right, other)
    assert [c["both_right"], c["only_this"], c["only_other"], c["both_wrong"]] == list(counts)
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


def changes(gained, lost, groups=None, n=300):
    """compare() of two models that differ in gained + lost of n pictures."""
    same = [False] * (n - gained - lost)
    return metrics.compare([True] * gained + [False] * lost + same, [False] * gained + [True] * lost + same, groups)


def test_the_printed_interval_decides_the_verdict():
    """All tables of 300 pictures; the two ends as the page prints them, with their signs."""
    signs = {}
    for gained in range(301):
        for lost in range(301 - gained):
            c = changes(gained, lost)
            signs.setdefault(c["verdict"], set()).add("".join(show(end, "points")[0] for end in c["difference_ci95"]))
    assert signs == {"better": {"++"}, "worse": {"--"}, "not_established": {"-+"}}
    assert [changes(*pair)["verdict"] for pair in ((11, 3), (3, 11), (3, 3))] == ["better", "worse", "not_established"]


GROUPS = {  # design effect: the group numbers of 300 pictures
    1: np.arange(300),
    1.5: np.concatenate([np.arange(150), 150 + np.repeat(np.arange(75), 2)]),
    3.7: np.repeat(np.arange(100), np.arange(100) % 5 + 1),
}


@pytest.mark.parametrize("effect", GROUPS)
def test_intervals_and_verdicts_hold_among_near_duplicates(effect):
    """4,000 pairs of equally good models that name all pictures of a group alike, at accuracies of 0.8 to 0.97."""
    random, groups = np.random.default_rng(0), GROUPS[effect].tolist()
    exact = {1: 1, 1.5: (150 + 75 * 4) / 300, 3.7: 20 * (1 + 4 + 9 + 16 + 25) / 300}
    assert metrics.design_effect(groups) == pytest.approx(exact[effect])
    part = np.r_[:15, 150:165] if effect == 1.5 else np.r_[:30]  # the pictures of one class
    of_class = metrics.design_effect([groups[i] for i in part])
    wilson, compare = functools.cache(metrics.wilson_interval), functools.cache(lambda *pair: changes(*pair, groups))
    held = []  # [accuracies][4000][accuracy, one class, difference]
    for accuracy in (0.8, 0.85, 0.9, 0.95, 0.97):
        this, other = (random.random((2, 4000, groups[-1] + 1)) < accuracy)[:, :, groups]
        counts = np.stack([this.sum(1), this[:, part].sum(1), (this & ~other).sum(1), (other & ~this).sum(1)], 1)
        held.append([])
        for correct, in_class, gained, lost in counts.tolist():
            ends = wilson(correct, 300, metrics.design_effect(groups)), wilson(in_class, 30, of_class)
            held[-1].append([low <= accuracy <= high for low, high in ends])
            held[-1][-1].append(compare(gained, lost)["verdict"] == "not_established")
    coverage = np.mean(held, axis=1)
    assert (coverage >= [0.93, 0.9, 0.94]).all() and (coverage[:, 0] <= 0.985).all(), coverage
    assert coverage[:, 2].mean() <= 0.985, "wide, where few pictures change, but not needlessly"


@pytest.mark.parametrize("effect", GROUPS)
def test_calibrated_models_are_called_calibrated_among_near_duplicates(effect):
    """400 calibrated models whose near-duplicates are right or wrong together. Each bin holds its true accuracy."""
    random, groups, called, held = np.random.default_rng(0), GROUPS[effect], 0, []
    for i in range(400):
        mean = (0.8, 0.85, 0.9, 0.95, 0.97)[i % 5]
        confidence = random.beta(10 * mean, 10 * (1 - mean), groups[-1] + 1)[groups] ** random.uniform(0.98, 1.02, 300)
        found = metrics.calibration(confidence, random.random(groups[-1] + 1)[groups] < confidence, groups.tolist())
        called += found["verdict"] != "calibrated"
        held += [row["accuracy_ci95"][0] <= row["confidence"] <= row["accuracy_ci95"][1] for row in found["bins"]]
    assert called <= 0.03 * 400 and np.mean(held) >= 0.9, (called, np.mean(held))


def test_one_mistake_is_no_verdict():
    """Of 300 answers at 99.999 % one is wrong: the label may be. Two groups of pictures are enough for a verdict."""
    for wrong, groups, verdict in (([7], None, "calibrated"), ([7, 8], None, "over-confident")):
        right = [i not in wrong for i in range(300)]
        found = metrics.calibration([0.99999] * 300, right, groups)
        assert (found["verdict"], found["one_mistake"]) == (verdict, verdict == "calibrated")
        assert found["ece"] > found["ece_if_calibrated"]["percentile_99"]
    near = metrics.calibration([0.99999] * 300, right, [7 if i == 8 else i for i in range(300)])
    assert (near["verdict"], near["one_mistake"]) == ("calibrated", True), "one picture and its near-duplicate"
    assert metrics.calibration([0.9] * 300, [True] * 300)["verdict"] == "under-confident"
    sure = metrics.calibration([1.0] * 3, [True] * 3)
    assert (sure["ece"], sure["verdict"]) == (0, "calibrated")


def test_every_part_of_a_report_is_widened_by_its_own_groups():
    """Class a: 10 pictures of one film. Class b: 10 films."""
    groups, truth, said = [0] * 10 + [*range(1, 11)], [0] * 10 + [1] * 10, [0] * 9 + [1] * 11
    report = metrics.measure(["a", "b"], truth, said, [[0.8, 0.2] if k == 0 else [0.1, 0.9] for k in said], groups)
    a, b = (report["per_class"][label]["recall_ci95"] for label in "ab")
    assert (a, b) == (metrics.wilson_interval(9, 10, 10), metrics.wilson_interval(10, 10))
    rows = {row["min_probability"]: row["accuracy_ci95"] for row in report["answered"]}
    assert rows[0] == report["accuracy_ci95"] == metrics.wilson_interval(19, 20, 110 / 20)
    assert rows[0.85] == metrics.wilson_interval(10, 11)
    in_bins = [row["accuracy_ci95"] for row in report["calibration"]["bins"]]
    assert in_bins == [metrics.wilson_interval(9, 9, 9), metrics.wilson_interval(10, 11)]


def test_macro_f1_is_over_the_labels_that_have_pictures():
    """One stray answer `c`, of which there is no picture."""
    truth, said = [0] * 5 + [1] * 5, [0] * 5 + [1] * 4 + [2]
    report = metrics.measure(["a", "b", "c"], truth, said)
    assert report["macro_f1"] == pytest.approx(f1_score(truth, said, labels=[0, 1], average="macro"))
    assert report["macro_f1"] > 0.9


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
