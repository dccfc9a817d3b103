"""The numbers of a report: counts, intervals, calibration and comparisons. Imports no torch and reads no file.

The tests hold every number against scikit-learn, scipy or statsmodels.
"""

from collections import Counter
from math import sqrt

from animals.command import UserError

CALIBRATION_BINS = 10  # each of equally many pictures
SIMULATIONS = 2000  # of a perfectly calibrated model


def wilson_interval(correct, n, design_effect=1.0):
    """The 95 % interval of a proportion (Wilson 1927), [low, high]. It is [0, 1] for n = 0.

    design_effect: how many pictures count as one independent picture; the interval is that of n / design_effect.
    """
    from scipy.stats import norm

    if n == 0:
        return [0.0, 1.0]
    z2, p, n = float(norm.ppf(0.975)) ** 2, correct / n, n / design_effect  # scipy's own takes no fraction of a picture
    middle, half = p + z2 / (2 * n), sqrt(z2 * (p * (1 - p) + z2 / (4 * n)) / n)
    low, high = (middle - half) / (1 + z2 / n), (middle + half) / (1 + z2 / n)
    return [low if correct else 0.0, high if p < 1 else 1.0]  # exact where rounding would leave 1e-17


def design_effect(groups):
    """The number of pictures that count as one independent picture, from each picture's group number; 1.0 for none.

    Kish (1965, Survey Sampling, 5.4 and 8.2): 1 + (m - 1) rho, with m = sum of squared group sizes / n where the sizes
    differ. rho, the correlation of the answers within a group, is taken as 1: near-duplicates nearly always get the
    same answer, few groups cannot estimate it better, and the interval is then never too narrow. So the result is m.
    """
    sizes = Counter(groups).values()
    return sum(size**2 for size in sizes) / sum(sizes) if sizes else 1.0


def measure(labels, truth, predicted, probability=None, groups=None):
    """The metrics of two equally long lists of class numbers, as a dict. A label that is never predicted scores 0.

    probability [pictures][labels] adds log_loss, ece, calibration and answered. groups: one number per picture, equal
    for near-duplicates. Macro averages are over the labels that occur in truth or predicted, as in scikit-learn.
    """
    from sklearn.metrics import confusion_matrix, log_loss, precision_recall_fscore_support

    n, classes = len(truth), list(range(len(labels)))
    confusion = confusion_matrix(truth, predicted, labels=classes)
    *found, support = precision_recall_fscore_support(truth, predicted, labels=classes, zero_division=0.0)
    scores = dict(zip(("precision", "recall", "f1"), found, strict=True))  # each [labels]
    occurring = support + confusion.sum(axis=0) > 0
    correct, effect = int(confusion.trace()), design_effect(groups or range(n))
    report = {
        "n": n,
        "correct": correct,
        "accuracy": correct / n,
        "accuracy_ci95": wilson_interval(correct, n, effect),
        "design_effect": effect,  # the interval is that of n / design_effect pictures
        "chance": 1 / len(labels),
        "majority": int(support.max()) / n,  # the accuracy of always answering the most frequent label
        "majority_label": labels[int(support.argmax())],
        **{f"macro_{name}": float(values[occurring].mean()) for name, values in scores.items()},
        "per_class": {
            label: {name: float(values[k]) for name, values in scores.items()}
            | {"n": int(support[k]), "recall_ci95": wilson_interval(int(confusion[k, k]), int(support[k]))}
            for k, label in enumerate(labels)
        },
        "confusion_matrix": confusion.tolist(),  # [truth][prediction]
        "labels": labels,
    }
    if probability is not None:
        confidence = [row[p] for row, p in zip(probability, predicted, strict=True)]
        right = [t == p for t, p in zip(truth, predicted, strict=True)]
        report["log_loss"] = float(log_loss(truth, probability, labels=classes))
        report |= {"calibration": calibration(confidence, right), "answered": answered(confidence, right)}
        report["ece"] = report["calibration"]["ece"]
    return report


def calibration(confidence, right):
    """Is the model right as often as its probabilities say?

    confidence: the probability of each answer that was given; right: whether that answer was correct. The dict holds
    ece: expected calibration error, the sum over bins of n / N x |accuracy - confidence| (Guo et al. 2017,
    arXiv:1706.04599). The bins hold equally many pictures (Nguyen and O'Connor 2015, arXiv:1508.05154): most
    probabilities are close to 1, and bins of equal width would put them all into one. Equal probabilities share a bin.
    ece_if_calibrated: median and 99th percentile of the same error for a model that is right with exactly the
    probability that it gives. verdict: calibrated, unless ece is above that percentile; then over-confident or
    under-confident if mean confidence - accuracy is outside 99 % of the simulated values, else miscalibrated.
    """
    import numpy as np

    confidence, right, n = np.asarray(confidence, np.float64), np.asarray(right, np.float64), len(right)
    edges = np.percentile(confidence, np.linspace(0, 100, CALIBRATION_BINS + 1))[1:-1]
    _, bin_of = np.unique(np.searchsorted(edges, confidence), return_inverse=True)  # empty bins have no number

    def errors(outcome):
        """ECE and the mean of confidence - accuracy, for whether each picture's answer is right."""
        differences = np.bincount(bin_of, confidence - outcome)  # [bins], the sum over the pictures of each
        return np.abs(differences).sum() / n, differences.sum() / n

    random, (ece, difference) = np.random.default_rng(0), errors(right)
    simulated = np.array([errors(random.random(n) < confidence) for _ in range(SIMULATIONS)])
    median, most = np.quantile(simulated[:, 0], [0.5, 0.99])
    low, high = np.quantile(simulated[:, 1], [0.005, 0.995])
    verdict = "over-confident" if difference > high else "under-confident" if difference < low else "miscalibrated"
    table, low = [], float(confidence.min())
    for b in range(bin_of.max() + 1):
        inside, correct = confidence[bin_of == b], int(right[bin_of == b].sum())
        row = {"low": low, "high": float(inside.max()), "n": len(inside), "confidence": float(inside.mean())}
        table.append(row | {"accuracy": correct / len(inside), "accuracy_ci95": wilson_interval(correct, len(inside))})
        low = row["high"]
    return {
        "ece": float(ece),
        "ece_if_calibrated": {"median": float(median), "percentile_99": float(most)},
        "verdict": verdict if ece > most else "calibrated",
        "mean_confidence": float(confidence.mean()),
        "bins": table,
    }


def answered(confidence, right):
    """[{min_probability, share that test.py still answers with it, accuracy on that share; None where that is 0}]."""
    rows = []
    for least in (k / 100 for k in range(100)):
        kept = [ok for p, ok in zip(confidence, right, strict=True) if p >= least]
        accuracy = sum(kept) / len(kept) if kept else None
        rows.append({"min_probability": least, "share": len(kept) / len(right), "accuracy": accuracy})
    return rows


def without_duplicates(pictures, right, known):
    """The accuracy without the held-out pictures that training has seen too: `duplicates` of report.json.

    pictures: paths; right: one boolean per picture; known: what pictures.duplicates.known_duplicates() returns, None
    where nobody searched. identical, near_duplicates: how many pictures have such a picture in train (a picture with
    both counts as identical). n_without, accuracy_without, accuracy_without_ci95: of the other pictures. groups: how
    many groups of near-duplicates the pictures form; a picture without a near-duplicate is a group of its own.
    """
    keys = ("identical", "near_duplicates", "n_without", "accuracy_without", "accuracy_without_ci95", "groups")
    if known is None:
        return {"checked": False} | dict.fromkeys(keys)
    identical = known["identical"].intersection(pictures)
    near = known["near_duplicates"].intersection(pictures) - identical
    group, seen = known["group"], identical | near
    kept = {picture: ok for picture, ok in zip(pictures, right, strict=True) if picture not in seen}
    correct, n, groups = sum(kept.values()), len(kept), len({group[picture] for picture in pictures})
    interval = wilson_interval(correct, n, design_effect([group[picture] for picture in kept]))
    values = (len(identical), len(near), n, correct / n if n else None, interval, groups)
    return {"checked": True} | dict(zip(keys, values, strict=True))


def compare(right, other_right):
    """Is `right` better than `other_right`? Two lists of booleans about the same pictures in the same order.

    difference: accuracy - other_accuracy. difference_ci95: its 95 % interval (Bonett and Price 2012), which is the
    normal interval of the mean difference per picture (-1, 0 or 1) after one gained and one lost picture are added. The
    addition keeps it correct where few pictures change, or all in one direction. mcnemar_p: McNemar's exact test of
    only_this against only_other.
    """
    from scipy.stats import binomtest, norm

    n, pairs = len(right), list(zip(right, other_right, strict=True))
    gained, lost = pairs.count((True, False)), pairs.count((False, True))
    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = float(norm.ppf(0.975)) * sqrt((up + down - (up - down) ** 2) / (n + 2))
    return {
        "n": n,
        "accuracy": sum(right) / n,
        "other_accuracy": sum(other_right) / n,
        "difference": (gained - lost) / n,
        "difference_ci95": [max(-1.0, up - down - half), min(1.0, up - down + half)],
        "both_right": pairs.count((True, True)),
        "only_this": gained,
        "only_other": lost,
        "both_wrong": pairs.count((False, False)),
        "mcnemar_p": float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0,
    }


def paired(pictures, other_rows, where):
    """The rows of another report's predictions.csv in the order of `pictures` [(image, sha256, label)].

    Pictures are paired by content, whatever their names. where: what an error calls the other report. Raises UserError
    unless both are about the same pictures with the same labels.
    """
    if other_rows and "sha256" not in other_rows[0]:  # an older version wrote it
        raise UserError(
            f"{where}: found no column sha256 in its predictions.csv; expected one, because pictures are paired by "
            "their content; run validation.sh for that checkpoint again"
        )
    ours, others = Counter(sha for _, sha, _ in pictures), Counter(row["sha256"] for row in other_rows)
    if ours != others:
        missing = [image for image, sha, _ in pictures if sha not in others][:1]
        extra = sorted(row["image"] for row in other_rows if row["sha256"] not in ours)[:1]
        raise UserError(
            f"{where}: found other pictures ({(others - ours).total()} not held out here, {extra}; "
            f"{(ours - others).total()} of ours lacking, {missing}); expected the same {len(pictures)} pictures; "
            "run validation.sh for both checkpoints on the same pictures"
        )
    order = sorted(range(len(pictures)), key=lambda i: pictures[i][1:])
    other = dict(zip(order, sorted(other_rows, key=lambda row: (row["sha256"], row["label"])), strict=True))
    if relabelled := [image for i, (image, _, label) in enumerate(pictures) if other[i]["label"] != label]:
        raise UserError(
            f"{where}: found other labels for {len(relabelled)} pictures, {relabelled[0]} among them; expected the "
            "same; run validation.sh for both checkpoints with the same label table"
        )
    return [other[i] for i in range(len(pictures))]


def one_sided(report):
    """(most, never), which look like a failed training: a label or None, and a list of labels.

    most: more than 90 % of the answers are this label, though fewer than half of the pictures show it. never: classes
    of ten pictures or more that are never the answer. Fewer than ten pictures say nothing.
    """
    n, labels = report["n"], report["labels"]
    answers = dict(zip(labels, map(sum, zip(*report["confusion_matrix"], strict=True)), strict=True))
    pictures = {label: row["n"] for label, row in report["per_class"].items()}
    most = [label for label in labels if n >= 10 and answers[label] > 0.9 * n and pictures[label] < n / 2]
    return next(iter(most), None), [label for label in labels if pictures[label] >= 10 and not answers[label]]
