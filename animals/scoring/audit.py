"""Which labels are likely wrong? Suspects among the pictures, by the features of the untuned vision tower.

A classifier is fitted on four fifths of the pictures of both splits and asked about the rest, five times, look-alikes
on one side; cleanlab (its Datalab) reads what it says:
label       confident learning (Northcutt et al. 2021, arXiv:1911.00068) takes the label for wrong; the least
            probable label first
outlier     far from its nearest neighbours: perhaps no animal at all
look-alike  much nearer to another picture than pictures are (crops, frames of one film), and the hashes of
            pictures/leaks.py do not know it. One of each such set is left out: it may stay

A suspect is a picture to look at, not a verdict. Nothing is moved or changed.
"""

import os

from animals.command import UserError
from animals.files import replacing
from animals.pictures.cache import SPLITS, csv_file, load_split
from animals.pictures.check import cores
from animals.pictures.leaks import find_leaks, load_pictures
from animals.scoring.features import features, load_tower
from animals.scoring.page import embed, render
from animals.scoring.rivals import STRENGTHS, regression

FOLDS = 5
REASONS = ("label", "outlier", "near-duplicate")
COLUMNS = ["image", "split", "label", "likely_label", "probability", "reason", "nearest"]
SHOWN = 300  # suspects of a reason on the page; audit.csv has all
NEIGHBOURS = 4  # beside each suspect on the page
FEWEST = 20  # pictures: cleanlab looks at ten neighbours of each


def audit(config, model):
    """Write <temp_dir>/audit.csv and audit.html; the suspects, as rows of the former. Call prepare() first.

    model: the checkpoint whose vision tower looks. probability is the likely label's; nearest the picture most like it.
    """
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    rows = [
        {"image": images[0], "split": split, "label": label, "sha256": sha}
        for split, data in ((split, load_split(config, split)) for split in SPLITS)
        for images, label, sha in zip(data["images"], data["label"], data["sha256"], strict=True)
    ]
    if len(rows) < FEWEST:
        raise UserError(f"--audit: found {len(rows)} pictures in {config.input_dir}; expected at least {FEWEST}")
    pictures = load_pictures(config, SPLITS)
    group = find_leaks(pictures, config.near_duplicate_distance, config.look_alike_limit)[1]
    group_of = dict(zip(pictures.image, group.tolist(), strict=True))
    workers = 0 if state.device.type == "cpu" else cores(config.data_processes)
    folder = os.path.join(config.temp_dir, "features")
    known = features(
        load_tower(model), [row["image"] for row in rows], [row["sha256"] for row in rows], folder, workers=workers
    )
    suspects = find_suspects(known, rows, [group_of[row["image"]] for row in rows])
    with csv_file(config, "audit.csv", COLUMNS) as out:
        out.writerows([row[column] for column in COLUMNS] for row in suspects)
    write_page(config, suspects, len(rows), model)
    return suspects


def find_suspects(known, rows, group):
    """The suspects among `rows` (dicts with image, split, label), with the other columns and `neighbours` filled in.

    known: float32 [rows, features]; group [rows]: equal numbers for look-alikes that the hashes know.
    """
    import numpy as np
    from cleanlab import Datalab
    from sklearn.preprocessing import StandardScaler

    labels, truth = np.unique([row["label"] for row in rows], return_inverse=True)
    probability = out_of_fold(known, truth, group)
    lab = Datalab({"label": truth}, label_name="label", verbosity=0)
    lab.find_issues(
        pred_probs=probability,
        features=StandardScaler().fit_transform(known),  # else what all pictures share makes every cosine near 1
        issue_types={"label": {}, "outlier": {}, "near_duplicate": {}},
    )
    issues = lab.get_issues()
    nearest = lab.get_info("statistics")["weighted_knn_graph"].indices.reshape(len(rows), -1)  # nearest first
    likely = probability.argmax(1)
    found, closest = {}, nearest[:, 0].tolist()
    for kind in ("label", "outlier"):
        score = issues[f"{kind}_score"].to_numpy()  # label: the given label's probability; low is bad
        for i in np.argsort(score, kind="stable"):
            if issues[f"is_{kind}_issue"].iloc[i]:
                found.setdefault(int(i), kind)
    sets = lab.get_info("near_duplicate")["near_duplicate_sets"]
    for i in range(len(rows)):  # the first of a set stays, the others name one before them
        others = [int(j) for j in sets[i] if j < i and group[j] != group[i]]
        if others and found.setdefault(i, "near-duplicate") == "near-duplicate":
            closest[i] = others[0]
    return [
        {key: rows[i][key] for key in ("image", "split", "label")}
        | {"likely_label": str(labels[likely[i]]), "probability": round(float(probability[i, likely[i]]), 4)}
        | {"reason": reason, "nearest": rows[closest[i]]["image"]}
        | {"neighbours": [rows[j] for j in nearest[i, :NEIGHBOURS]]}
        for i, reason in found.items()
    ]


def out_of_fold(known, truth, group):
    """float [pictures, labels]: what a classifier says that saw neither the picture nor its look-alikes.

    known: float32 [pictures, features]; truth, group: [pictures]. Its C is the one of least log loss on such pictures:
    the suspects are told by their probabilities, and these by a proper scoring rule (Gneiting and Raftery 2007).
    """
    import numpy as np
    from sklearn.metrics import log_loss
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from threadpoolctl import threadpool_limits

    folds = StratifiedGroupKFold(max(2, min(FOLDS, int(np.bincount(truth).min()))), shuffle=True, random_state=0)
    least, probability = np.inf, None
    with threadpool_limits(1):  # small products: threads wait for each other longer than they work
        for c in STRENGTHS:  # the loss falls, then rises: what follows costs most and serves nothing
            said = cross_val_predict(regression(c), known, truth, cv=folds, groups=group, method="predict_proba")
            if (loss := log_loss(truth, said)) > least:
                break
            least, probability = loss, said
    return probability


def write_page(config, suspects, n, model):
    """<temp_dir>/audit.html: one file, pictures within it, nothing fetched."""
    parts = {reason: [row for row in suspects if row["reason"] == reason] for reason in REASONS}
    shown = [row for part in parts.values() for row in part[:SHOWN]]
    twins = [other["image"] for row in shown for other in row["neighbours"]] + [row["nearest"] for row in shown]
    small, large, dropped = embed(twins, [row["image"] for row in shown])
    html = render(
        "audit.html",
        config.temp_dir,
        config.language,
        parts=parts,
        shown=SHOWN,
        n=n,
        model=model,
        small=small,
        large=large,
        dropped=dropped,
    )
    with replacing(os.path.join(config.temp_dir, "audit.html")) as file:
        file.write(html)
