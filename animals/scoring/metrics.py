"""The numbers of a report: counts, intervals, calibration and comparisons. Imports no torch and reads no file.

The tests hold every number against scikit-learn, scipy or statsmodels.
"""

from collections import Counter
from math import sqrt
from statistics import NormalDist

from animals.command import UserError

CALIBRATION_BINS = 10  # each of equally many pictures
SIMULATIONS = 2000  # of a perfectly calibrated model
Z = NormalDist().inv_cdf(0.975)  # 1.96, for 95 % intervals


def wilson_interval(correct, n, design_effect=1.0):
    """The 95 % interval of a proportion (Wilson 1927), [low, high]. It is [0, 1] for n = 0.

    design_effect: how many pictures count as one independent picture; the interval is that of n / design_effect.
    """
    if n == 0:
        return [0.0, 1.0]
    z2, p, n = Z**2, correct / n, n / design_effect  # scipy's own takes no fraction of a picture
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


def measured(pictures):
    """(accuracy, its 95 % interval) of [(whether the answer is right, group number)]; the accuracy of none is None."""
    correct, n = sum(right for right, _ in pictures), len(pictures)
    interval = wilson_interval(correct, n, design_effect([group for _, group in pictures]))
    return correct / n if n else None, interval


def measure(labels, truth, predicted, probability=None, groups=None):
    """The metrics of two equally long lists of class numbers, as a dict. A label that is never predicted scores 0.

    probability [pictures][labels] adds log_loss, ece, calibration and answered. groups: one number per picture, equal
    for near-duplicates; every interval is widened by the groups of the pictures that it is about. Macro averages are
    over the labels that have pictures: one stray answer of another label would count like a class.
    """
    from sklearn.metrics import confusion_matrix, log_loss, precision_recall_fscore_support

    n, classes, groups = len(truth), list(range(len(labels))), groups or range(len(truth))
    confusion = confusion_matrix(truth, predicted, labels=classes)
    *found, support = precision_recall_fscore_support(truth, predicted, labels=classes, zero_division=0.0)
    scores = dict(zip(("precision", "recall", "f1"), found, strict=True))  # each [labels]
    right = [t == p for t, p in zip(truth, predicted, strict=True)]
    pictures = list(zip(right, groups, strict=True))
    of_class = [[picture for picture, t in zip(pictures, truth, strict=True) if t == k] for k in classes]
    accuracy, interval = measured(pictures)
    report = {
        "n": n,
        "correct": sum(right),
        "accuracy": accuracy,
        "accuracy_ci95": interval,
        "design_effect": design_effect(groups),  # the interval is that of n / design_effect pictures
        "chance": 1 / len(labels),
        "majority": int(support.max()) / n,  # the accuracy of always answering the most frequent label
        "majority_label": labels[int(support.argmax())],
        **{f"macro_{name}": float(values[support > 0].mean()) for name, values in scores.items()},
        "per_class": {
            label: {name: float(values[k]) for name, values in scores.items()}
            | {"n": len(of_class[k]), "recall_ci95": measured(of_class[k])[1]}
            for k, label in enumerate(labels)
        },
        "confusion_matrix": confusion.tolist(),  # [truth][prediction]
        "labels": labels,
    }
    if probability is not None:
        confidence = [row[p] for row, p in zip(probability, predicted, strict=True)]
        report["log_loss"] = float(log_loss(truth, probability, labels=classes))
        report["calibration"] = calibration(confidence, right, groups)
        report["answered"] = answered(confidence, right, groups)
        report["ece"] = report["calibration"]["ece"]
    return report


def calibration(confidence, right, groups=None):
    """Is the model right as often as its probabilities say?

    confidence: the probability of each answer that was given; right: whether it was correct; groups: as in measure().
    The dict holds
    ece: expected calibration error, the sum over bins of n / N x |accuracy - confidence| (Guo et al. 2017,
    arXiv:1706.04599). The bins hold equally many pictures (Nguyen and O'Connor 2015, arXiv:1508.05154): most
    probabilities are close to 1, and bins of equal width would put them all into one. Equal probabilities share a bin.
    ece_if_calibrated: median and 99th percentile of the same error for a model that is right with exactly the
    probability that it gives, where near-duplicates are right or wrong together (one random number per group).
    verdict: calibrated, unless ece is above that percentile; then over-confident or under-confident if mean
    confidence - accuracy is outside 99 % of the simulated values, else miscalibrated. one_mistake: ece is above the
    percentile only because of the most confident mistake (with its near-duplicates); one wrong label would explain
    that, so the verdict is calibrated.
    """
    import numpy as np

    confidence, right, n = np.asarray(confidence, np.float64), np.asarray(right, np.float64), len(right)
    _, group = np.unique(range(n) if groups is None else groups, return_inverse=True)
    edges = np.percentile(confidence, np.linspace(0, 100, CALIBRATION_BINS + 1))[1:-1]
    _, bin_of = np.unique(np.searchsorted(edges, confidence), return_inverse=True)  # empty bins have no number
    inside = np.eye(bin_of.max() + 1)[bin_of]  # [pictures, bins], 1 where a picture is in the bin

    def errors(outcome):
        """ECE and the mean of confidence - accuracy: [..., 2] for `outcome` [..., pictures], 1 for a right answer."""
        differences = (confidence - outcome) @ inside  # [..., bins], the sum over the pictures of each
        return np.stack([np.abs(differences).sum(-1), differences.sum(-1)], -1) / n

    random, (ece, difference) = np.random.default_rng(0), errors(right)
    draws = (random.random((100, group.max() + 1))[:, group] for _ in range(SIMULATIONS // 100))  # each [100, pictures]
    simulated = np.concatenate([errors(draw < confidence) for draw in draws])
    median, most = np.quantile(simulated[:, 0], [0.5, 0.99])
    most += 1e-12  # sums of the same numbers in another order differ by less
    low, high = np.quantile(simulated[:, 1], [0.005, 0.995])
    verdict = "over-confident" if difference > high else "under-confident" if difference < low else "miscalibrated"
    worst = group[np.where(right > 0, -1, confidence).argmax()]  # the group of the most confident mistake
    one_mistake = bool(ece > most >= errors(np.where(group == worst, 1, right))[0])
    table, low = [], float(confidence.min())
    for b in range(bin_of.max() + 1):
        here = confidence[bin_of == b]
        row = {"low": low, "high": float(here.max()), "n": len(here), "confidence": float(here.mean())}
        pairs = zip(right[bin_of == b].tolist(), group[bin_of == b].tolist(), strict=True)
        row["accuracy"], row["accuracy_ci95"] = measured(list(pairs))
        table.append(row)
        low = row["high"]
    return {
        "ece": float(ece),
        "ece_if_calibrated": {"median": float(median), "percentile_99": float(most)},
        "verdict": verdict if ece > most and not one_mistake else "calibrated",
        "one_mistake": one_mistake,
        "mean_confidence": float(confidence.mean()),
        "bins": table,
    }


def answered(confidence, right, groups=None):
    """[{min_probability, share that test.py still answers with it, accuracy on that share and accuracy_ci95}].

    accuracy is None where the share is 0. Whoever takes the best row has chosen it on these very pictures.
    """
    pictures = list(zip(confidence, right, groups or range(len(right)), strict=True))
    kept = {k / 100: [(ok, group) for p, ok, group in pictures if p >= k / 100] for k in range(100)}
    rows = ((least, len(some) / len(right), *measured(some)) for least, some in kept.items())
    return [dict(zip(("min_probability", "share", "accuracy", "accuracy_ci95"), row, strict=True)) for row in rows]


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
    kept = [(ok, group[picture]) for picture, ok in zip(pictures, right, strict=True) if picture not in seen]
    groups = len({group[picture] for picture in pictures})
    values = (len(identical), len(near), len(kept), *measured(kept), groups)
    return {"checked": True} | dict(zip(keys, values, strict=True))


def compare(right, other_right, groups=None):
    """Is `right` better than `other_right`? Two lists of booleans about the same pictures; groups: as in measure().

    difference: accuracy - other_accuracy. difference_ci95: its 95 % interval (Bonett and Price 2012), which is the
    normal interval of the mean difference per picture (-1, 0 or 1) after one gained and one lost picture are added. The
    addition keeps it correct where few pictures change, or all in one direction. Near-duplicates count as
    n / design_effect pictures. verdict: better or worse where the interval excludes zero, else not_established; no
    test decides it, because a test (McNemar's, say) contradicts the interval in some tables.
    """
    n, pairs = len(right), list(zip(right, other_right, strict=True))
    gained, lost = pairs.count((True, False)), pairs.count((False, True))
    effect = design_effect(groups or range(n))
    size = n / effect + 2
    up, down = (gained / effect + 1) / size, (lost / effect + 1) / size
    half = Z * sqrt((up + down - (up - down) ** 2) / size)
    low, high = max(-1.0, up - down - half), min(1.0, up - down + half)
    return {
        "n": n,
        "accuracy": sum(right) / n,
        "other_accuracy": sum(other_right) / n,
        "difference": (gained - lost) / n,
        "difference_ci95": [low, high],
        "verdict": "better" if low > 0 else "worse" if high < 0 else "not_established",
        "both_right": pairs.count((True, True)),
        "only_this": gained,
        "only_other": lost,
        "both_wrong": pairs.count((False, False)),
    }


def paired(pictures, other_rows, where):
    """The rows of another report's predictions.csv in the order of `pictures` [(image, sha256, label)].

    Pictures are paired by content, whatever their names. where: what an error calls the other report. Raises UserError
    unless both are about the same pictures with the same labels.
    """
    if other_rows and "sha256" not in other_rows[0]:  # an older version wrote it
        found = "found no column sha256 in its predictions.csv; expected one, because pictures are paired by content"
        raise UserError(f"{where}: {found}; run validation.sh for that checkpoint again")
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
        found = f"found other labels for {len(relabelled)} pictures, {relabelled[0]} among them; expected the same"
        raise UserError(f"{where}: {found}; run validation.sh for both checkpoints with the same label table")
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
