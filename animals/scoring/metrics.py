"""The numbers of a report: counts, intervals, calibration, comparisons; by scikit-learn and scipy where they have them.

No torch, no files; tests hold every one against scikit-learn, scipy or statsmodels.
"""

from collections import Counter
from math import sqrt

from animals.command import UserError

CALIBRATION_BINS = 10  # of equally many pictures
SIMULATIONS = 2000  # of a perfectly calibrated model
THRESHOLDS = [k / 100 for k in range(100)]  # of `answered`


def wilson_interval(correct, n, design_effect=1.0):
    """95 % interval of a proportion (Wilson 1927) of n / design_effect pictures: [low, high]; [0, 1] for n = 0."""
    from scipy.stats import norm

    if n == 0:
        return [0.0, 1.0]
    z2, p, n = float(norm.ppf(0.975)) ** 2, correct / n, n / design_effect
    middle, half = p + z2 / (2 * n), sqrt(z2 * (p * (1 - p) + z2 / (4 * n)) / n)
    low, high = (middle - half) / (1 + z2 / n), (middle + half) / (1 + z2 / n)
    return [low if correct else 0.0, high if p < 1 else 1.0]  # exact where rounding would leave 1e-17


def design_effect(groups):
    """How many times fewer independent pictures there are than pictures, for the group number of each; 1.0 for none.

    Kish (1965, Survey Sampling, 5.4 and 8.2): 1 + (m - 1) rho with m = sum of squared group sizes / n where sizes
    differ. rho, how alike the answers within a group are, is taken as 1: look-alikes are nearly always named alike,
    few groups do not tell it better, and the interval can then not be too narrow. What remains is m.
    """
    sizes = Counter(groups).values()
    return sum(size**2 for size in sizes) / sum(sizes) if sizes else 1.0


def measure(labels, truth, predicted, probability=None, groups=None):
    """Metrics of two equally long lists of class numbers. A label never seen scores 0.

    probability [n][labels], where it is known, adds log_loss, ece, calibration and answered. groups: a number a
    picture, equal for look-alikes. Macro averages are over the labels that occur in truth or predicted, as
    scikit-learn's own.
    """
    from sklearn.metrics import accuracy_score, confusion_matrix, log_loss, precision_recall_fscore_support

    classes = list(range(len(labels)))
    n, accuracy = len(truth), float(accuracy_score(truth, predicted))
    per_class = precision_recall_fscore_support(truth, predicted, labels=classes, zero_division=0.0)
    macro = precision_recall_fscore_support(truth, predicted, average="macro", zero_division=0.0)[:3]
    confusion = confusion_matrix(truth, predicted, labels=classes)
    effect = design_effect(groups or range(n))
    report = {
        "n": n,
        "correct": round(accuracy * n),
        "accuracy": accuracy,
        "accuracy_ci95": wilson_interval(round(accuracy * n), n, effect),
        "design_effect": effect,  # the interval is taken at n / design_effect
        "chance": 1 / len(labels),
        "majority": int(per_class[3].max()) / n,  # the accuracy of always naming the most frequent label
        "majority_label": labels[int(per_class[3].argmax())],
        **{f"macro_{name}": float(value) for name, value in zip(("precision", "recall", "f1"), macro, strict=True)},
        "per_class": {
            label: {"precision": float(p), "recall": float(r), "f1": float(f), "n": int(s)}
            | {"recall_ci95": wilson_interval(int(confusion[k, k]), int(s))}
            for k, (label, p, r, f, s) in enumerate(zip(labels, *per_class, strict=True))
        },
        "confusion_matrix": confusion.tolist(),  # [truth][prediction]
        "labels": labels,
    }
    if probability is not None:
        confidence = [row[p] for row, p in zip(probability, predicted, strict=True)]
        right = [t == p for t, p in zip(truth, predicted, strict=True)]
        report["log_loss"] = float(log_loss(truth, probability, labels=classes))
        report["calibration"] = calibration(confidence, right)
        report["ece"] = report["calibration"]["ece"]
        report["answered"] = answered(confidence, right)
    return report


def calibration(confidence, right, bins=CALIBRATION_BINS):
    """Is it right as often as it is certain? The expected calibration error beside what chance alone would show.

    confidence: probability of each answer given; right: whether it was correct.
    ece: sum over bins of n / N x |accuracy - confidence| (Guo et al. 2017, arXiv:1706.04599), over bins of equally
    many pictures (Nguyen and O'Connor 2015, arXiv:1508.05154): most certainties are alike, and equal widths would put
    them all in one bin. Equal certainties share a bin, so there may be fewer.
    ece_if_calibrated: median and 99th percentile of the same for a model whose every answer is right with exactly the
    probability it says (consistency resampling, Broecker and Smith 2007, doi:10.1175/WAF993.1), from a fixed seed.
    verdict: "calibrated" within that 99th percentile (1 to 3 % of calibrated models are not, then); beyond it
    "over-confident" or "under-confident" where the mean certainty is outside 99 % of the same simulations, too, and
    "miscalibrated" where errors of both signs cancel.
    bins: low (not included, but in the first), high, n, mean confidence, accuracy and its Wilson interval.
    """
    import numpy as np

    confidence, right = np.asarray(confidence, dtype=np.float64), np.asarray(right, dtype=np.float64)
    order = np.argsort(confidence, kind="stable")
    confidence, right = confidence[order], right[order]
    edges = np.quantile(confidence, np.linspace(0, 1, bins + 1)[1:-1])
    starts = np.unique([0, *np.searchsorted(confidence, edges, "right")])  # of the bins in the sorted list
    starts = starts[starts < len(confidence)]
    counts = np.diff([*starts, len(confidence)])
    certain = np.add.reduceat(confidence, starts)

    def gaps(correct):
        """ECE and mean certainty less accuracy of outcomes [simulations, n]."""
        gap = certain - np.add.reduceat(correct, starts, axis=1)
        return np.abs(gap).sum(1) / len(confidence), gap.sum(1) / len(confidence)

    random, block = np.random.default_rng(0), max(1, 2_000_000 // len(confidence))  # 16 MB of outcomes at once
    simulated = [
        gaps((random.random((min(block, SIMULATIONS - done), len(confidence))) < confidence).astype(np.float64))
        for done in range(0, SIMULATIONS, block)
    ]
    by_chance, mean_gaps = (np.concatenate(part) for part in zip(*simulated, strict=True))
    (ece,), (mean_gap,) = gaps(right[None])
    median, most = np.quantile(by_chance, [0.5, 0.99])
    low, high = np.quantile(mean_gaps, [0.005, 0.995])
    verdict = "over-confident" if mean_gap > high else "under-confident" if mean_gap < low else "miscalibrated"
    stops, table = [*starts[1:], len(confidence)], []
    for start, stop, n in zip(starts, stops, counts, strict=True):
        correct = int(right[start:stop].sum())
        table.append(
            {"low": float(confidence[start - 1] if start else confidence[0]), "high": float(confidence[stop - 1])}
            | {"n": int(n), "confidence": float(confidence[start:stop].mean()), "accuracy": correct / int(n)}
            | {"accuracy_ci95": wilson_interval(correct, int(n))}
        )
    return {
        "ece": float(ece),
        "ece_if_calibrated": {"median": float(median), "percentile_99": float(most)},
        "verdict": verdict if ece > most else "calibrated",
        "mean_confidence": float(confidence.mean()),
        "bins": table,
    }


def answered(confidence, right):
    """[{min_probability, share, accuracy}]: of what test.py --min_probability still answers, how much is right.

    accuracy is None where nothing is answered.
    """
    import numpy as np

    confidence, right = np.asarray(confidence), np.asarray(right)
    rows = []
    for threshold in THRESHOLDS:
        said = confidence >= threshold
        accuracy = float(right[said].mean()) if said.any() else None
        rows.append({"min_probability": threshold, "share": float(said.mean()), "accuracy": accuracy})
    return rows


def without_leaks(pictures, right, known):
    """What the leaks that the check knows of make of the accuracy: `leaks` of report.json.

    pictures: paths; right: a boolean each; known: as pictures.leaks.known_leaks() gives it, None where nobody looked.
    identical, look_alikes: pictures with such a one in train (one that has both is identical); n_without and
    accuracy_without: of the others; groups: how many of look-alikes the pictures form, single ones counted.
    """
    keys = ("identical", "look_alikes", "n_without", "accuracy_without", "accuracy_without_ci95", "groups")
    if known is None:
        return {"checked": False} | dict.fromkeys(keys)
    same, near = (set(known[key]) for key in ("identical", "look_alikes"))
    clean = [i for i, picture in enumerate(pictures) if picture not in same and picture not in near]
    correct, n = sum(right[i] for i in clean), len(clean)
    effect = design_effect([known["group"][pictures[i]] for i in clean])
    values = (
        sum(picture in same for picture in pictures),
        sum(picture in near and picture not in same for picture in pictures),
        n,
        correct / n if n else None,
        wilson_interval(correct, n, effect),
        len({known["group"][picture] for picture in pictures}),
    )
    return {"checked": True} | dict(zip(keys, values, strict=True))


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
    """The other's rows (of predictions.csv) in the order of `pictures` [(image, sha256, label)], paired by content.

    Raises UserError unless both are about the same pictures, whatever their names, with the same labels.
    """
    if other_rows and "sha256" not in other_rows[0]:
        raise UserError(
            f"{where}: found no column sha256 in its predictions.csv (an older version wrote it); expected one, "
            "pictures are paired by their content; run validation.sh for that checkpoint again"
        )
    others, pools = Counter(row["sha256"] for row in other_rows), {}
    for row in other_rows:
        pools.setdefault((row["sha256"], row["label"]), []).append(row)
    ours = Counter(sha for _, sha, _ in pictures)
    if ours != others:
        missing = [image for image, sha, _ in pictures if sha not in others]
        extra = sorted(row["image"] for row in other_rows if row["sha256"] not in ours)
        raise UserError(
            f"{where}: found other pictures ({(others - ours).total()} not held out here, {extra[:1]}; "
            f"{(ours - others).total()} of ours lacking, {missing[:1]}); expected the same {len(pictures)} pictures; "
            "run validation.sh for both checkpoints on the same pictures"
        )
    result, changed = [], []
    for image, sha, label in pictures:
        pool = pools.get((sha, label))
        result.append(pool.pop() if pool else changed.append(image))
    if changed:
        raise UserError(
            f"{where}: found other labels for {len(changed)} pictures, {changed[0]} among them; expected the same; run "
            "validation.sh for both checkpoints with the same label table"
        )
    return result
