"""Find pictures whose label is disputed, by the features of a checkpoint's vision tower.

    python scripts/audit.py             # the vision tower is that of model/, or of --model_name_or_path

Leaves <temp_dir>/audit.csv and <temp_dir>/audit.html, a list of suspects: each is a picture to look at, not a verdict.
A classifier is fitted on four fifths of the pictures of both splits and asked about
the other fifth, five times, with near-duplicates always in the same fifth; cleanlab (its Datalab) judges the answers.
The column `reason` holds

label           disputed label: the classifier is confident of another one (confident learning, Northcutt et al. 2021,
                arXiv:1911.00068); the least probable label comes first. How many of these are wrong nobody knows before
                a look: with the demo's 2,500 pictures none of 75 was where all labels were right, 50 of 123 were where
                3 % of all labels were wrong; cleanlab's own estimate was 76 and 128 wrong labels
outlier         far from its nearest neighbours: perhaps there is no animal in it
near-duplicate  much nearer to another picture than pictures usually are (crops, frames of one film), and not found by
                the hashes of data_process_utils.py. One picture of each such set may stay and is not listed
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import config as settings
from animals.checkpoint.task import settings_for
from animals.command import UserError, run
from animals.files import replacing, require_writable
from animals.pictures.cache import SPLITS, csv_file, load_split, lock
from animals.pictures.duplicates import known_duplicates
from animals.pictures.prepare import check_inputs
from animals.scoring.features import STRENGTHS, features, load_tower, regression
from animals.scoring.page import embed, render

FOLDS = 5
REASONS = ("label", "outlier", "near-duplicate")
COLUMNS = ["image", "split", "label", "likely_label", "probability", "reason", "nearest"]
SHOWN = 300  # suspects per reason on the page; audit.csv has all
NEIGHBOURS = 4  # pictures beside each suspect on the page
FEWEST = 20  # pictures; cleanlab looks at ten neighbours of each


def find_suspects(known, rows, group):
    """(suspects, wrong) among `rows`, dicts with image, split and label. suspects have the other COLUMNS, `neighbours`.

    wrong: cleanlab's estimate of the wrong labels; rather too high, because it counts the classifier's mistakes, too.
    known: float32 features [rows, features]. group [rows]: equal values for near-duplicates that the hashes know.
    Of each suspect, probability is that of the likely label, nearest is the picture that is most like it, and
    neighbours are the rows of the NEIGHBOURS nearest pictures.
    """
    import numpy as np
    from cleanlab import Datalab
    from cleanlab.count import num_label_issues
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
    likely, closest = probability.argmax(1), nearest[:, 0].tolist()
    reasons = {}  # row number -> reason, in the order of the list
    for reason in ("label", "outlier"):
        found = issues[issues[f"is_{reason}_issue"]]
        for i in found.sort_values(f"{reason}_score", kind="stable").index:  # of `label`: the given label's probability
            reasons.setdefault(i, reason)
    sets = lab.get_info("near_duplicate")["near_duplicate_sets"]
    for i in range(len(rows)):  # the first picture of a set may stay, each other one names a picture before it
        others = [int(j) for j in sets[i] if j < i and group[j] != group[i]]
        if others and reasons.setdefault(i, "near-duplicate") == "near-duplicate":
            closest[i] = others[0]
    suspects = [
        {key: rows[i][key] for key in ("image", "split", "label")}
        | {"likely_label": str(labels[likely[i]]), "probability": round(float(probability[i, likely[i]]), 4)}
        | {"reason": reason, "nearest": rows[closest[i]]["image"]}
        | {"neighbours": [rows[j] for j in nearest[i, :NEIGHBOURS]]}
        for i, reason in reasons.items()
    ]
    return suspects, int(num_label_issues(truth, probability, estimation_method="off_diagonal_calibrated"))


def out_of_fold(known, truth, group):
    """float [pictures, labels]: the answers of classifiers that saw neither the picture nor its near-duplicates.

    known: float32 [pictures, features]; truth, group: [pictures]. C is the one with the least log loss: the suspects
    are found by the probabilities, and log loss is a proper scoring rule for these (Gneiting and Raftery 2007).
    """
    import numpy as np
    from sklearn.metrics import log_loss
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from threadpoolctl import threadpool_limits

    folds = StratifiedGroupKFold(max(2, min(FOLDS, int(np.bincount(truth).min()))), shuffle=True, random_state=0)
    least, best = np.inf, None
    with threadpool_limits(1):  # in such small products threads wait for each other longer than they work
        for strength in STRENGTHS:  # the loss falls, then rises: stop there, larger values take the longest
            model = regression(strength)
            answers = cross_val_predict(model, known, truth, cv=folds, groups=group, method="predict_proba")
            if (loss := log_loss(truth, answers)) > least:
                break
            least, best = loss, answers
    return best


def main():
    parser = settings.parser(__doc__.splitlines()[0], (*settings.DATA_FIELDS, "language"))
    parser.add_argument("--model_name_or_path", default="model", help="the checkpoint whose vision tower is used")
    args = parser.parse_args()
    require_writable("--temp_dir", args.temp_dir)
    model = args.model_name_or_path
    config = settings_for(settings.config_from(args), model, training=True)
    config.allow_leaks = True  # identical pictures that were found are no reason not to look further
    check_inputs(config, model, SPLITS)
    with lock(config):  # one state of the cache
        parts, known = {split: load_split(config, split) for split in SPLITS}, known_duplicates(config)
    rows = [
        {"image": row["images"][0], "split": split, "label": row["label"], "sha256": row["sha256"]}
        for split, part in parts.items()
        for row in part
    ]
    if len(rows) < FEWEST:
        raise UserError(f"{config.input_dir}: found {len(rows)} pictures; expected at least {FEWEST}; add pictures")
    pictures, sha256 = ([row[key] for row in rows] for key in ("image", "sha256"))
    group = (known or {"group": dict(zip(pictures, sha256, strict=True))})["group"]
    known = features(load_tower(model), pictures, sha256, config)
    suspects, wrong = find_suspects(known, rows, [group[picture] for picture in pictures])
    with csv_file(config, "audit.csv", COLUMNS) as out:
        out([row[column] for column in COLUMNS] for row in suspects)
    parts = {reason: [row for row in suspects if row["reason"] == reason] for reason in REASONS}
    shown = [row for part in parts.values() for row in part[:SHOWN]]
    beside = [other["image"] for row in shown for other in row["neighbours"]]
    values = {"parts": parts, "shown": SHOWN, "n": len(rows), "wrong": wrong, "model": model}
    values |= embed(beside, [row["image"] for row in shown])
    with replacing(os.path.join(config.temp_dir, "audit.html")) as file:
        file.write(render("audit.html", config.temp_dir, config.language, **values))
    found = ", ".join(f"{reason} {len(part):,}" for reason, part in parts.items())
    print(f"suspects: {found}; listed in {config.temp_dir}/audit.csv; look at them in {config.temp_dir}/audit.html")
    print(
        f"label means disputed: cleanlab estimates {wrong:,} wrong labels among {len(rows):,}, at most: this counts "
        "the classifier's own mistakes, too; where all labels are right, none of the disputed ones is wrong"
    )


if __name__ == "__main__":
    run(main)
