"""The numbers of a report: scikit-learn and scipy compute them, here they are only named and put together.

No torch, no files; tests hold every one against scikit-learn, scipy or statsmodels.
"""

from math import sqrt

from animals.command import UserError

CALIBRATION_BINS = 10  # equal parts of 0..1


def wilson_interval(correct, n):
    """95 % interval of a proportion (Wilson 1927): [low, high]; [0, 1] for n = 0."""
    from scipy.stats import binomtest

    if n == 0:
        return [0.0, 1.0]
    low, high = binomtest(correct, n).proportion_ci(0.95, method="wilson")
    return [float(low), float(high)]


def measure(labels, truth, predicted, probability=None):
    """Metrics of two equally long lists of class numbers. A label never seen scores 0.

    probability [n][labels], where it is known, adds log_loss, ece and calibration. Macro averages are over the
    labels that occur in truth or predicted, as scikit-learn's own.
    """
    from sklearn.metrics import accuracy_score, confusion_matrix, log_loss, precision_recall_fscore_support

    classes = list(range(len(labels)))
    n, accuracy = len(truth), float(accuracy_score(truth, predicted))
    per_class = precision_recall_fscore_support(truth, predicted, labels=classes, zero_division=0.0)
    macro = precision_recall_fscore_support(truth, predicted, average="macro", zero_division=0.0)[:3]
    report = {
        "n": n,
        "correct": round(accuracy * n),
        "accuracy": accuracy,
        "accuracy_ci95": wilson_interval(round(accuracy * n), n),
        "chance": 1 / len(labels),
        **{f"macro_{name}": float(value) for name, value in zip(("precision", "recall", "f1"), macro, strict=True)},
        "per_class": {
            label: {"precision": float(p), "recall": float(r), "f1": float(f), "n": int(s)}
            for label, p, r, f, s in zip(labels, *per_class, strict=True)
        },
        "confusion_matrix": confusion_matrix(truth, predicted, labels=classes).tolist(),  # [truth][prediction]
        "labels": labels,
    }
    if probability is not None:
        confidence = [row[p] for row, p in zip(probability, predicted, strict=True)]
        right = [t == p for t, p in zip(truth, predicted, strict=True)]
        report["log_loss"] = float(log_loss(truth, probability, labels=classes))
        report["ece"], report["calibration"] = calibration(confidence, right)
    return report


def calibration(confidence, right, bins=CALIBRATION_BINS):
    """(ECE, bins): the expected calibration error (Guo et al. 2017, arXiv:1706.04599) and what it is made of.

    confidence: probability of each answer given; right: whether it was correct. A bin: low, high, n, and for n > 0
    mean confidence and accuracy. ECE = sum over bins of n / N x |accuracy - confidence|.
    """
    import numpy as np

    confidence, right = np.asarray(confidence, dtype=np.float64), np.asarray(right, dtype=np.float64)
    place = np.clip(np.ceil(confidence * bins) - 1, 0, bins - 1)  # (low, high], as in the paper
    table, ece = [], 0.0
    for b in range(bins):
        inside = place == b
        row = {"low": b / bins, "high": (b + 1) / bins, "n": int(inside.sum()), "confidence": None, "accuracy": None}
        if row["n"]:
            row["confidence"], row["accuracy"] = float(confidence[inside].mean()), float(right[inside].mean())
            ece += row["n"] / len(right) * abs(row["accuracy"] - row["confidence"])
        table.append(row)
    return ece, table


def compare(right, other_right):
    """Is `right` better than `other_right`, two lists of booleans about the same pictures in the same order?

    difference: of the accuracies; difference_ci95: Bonett and Price (2012), i.e. the normal interval of the mean
    per-picture difference (-1, 0, 1) after one picture of each change is added, which keeps it honest where no
    picture, or every changed one, went the same way; mcnemar_p: McNemar's exact test of only_this against only_other.
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
    """The other's rows (dicts with image, label, prediction) in the order of `pictures` [(image, label)].

    Raises UserError unless both are about the same pictures with the same labels.
    """
    other = {row["image"]: row for row in other_rows}
    missing = [image for image, _ in pictures if image not in other]
    extra = set(other) - {image for image, _ in pictures}
    if missing or extra:
        raise UserError(
            f"--compare_with {where}: found other pictures ({len(extra)} not held out here, {sorted(extra)[:1]}; "
            f"{len(missing)} of ours lacking, {missing[:1]}); expected the same {len(pictures)} pictures; run "
            "validation.sh for both checkpoints on the same --input_dir"
        )
    changed = [image for image, label in pictures if other[image]["label"] != label]
    if changed:
        raise UserError(
            f"--compare_with {where}: found other labels for {len(changed)} pictures, {changed[0]} among them; "
            "expected the same; run validation.sh for both checkpoints with the same label table"
        )
    return [other[image] for image, _ in pictures]
