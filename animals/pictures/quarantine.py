"""Move pictures out of the splits without deleting any, and put them back. Called by data_process_utils.py:

    python data_process_utils.py --quarantine temp/leaks.csv
    python data_process_utils.py --undo_quarantine

The list is a CSV file with a column `image`, paths as in train.json: leaks.csv, audit.csv and excluded.csv as they are,
or with the rows deleted that a look at the pictures cleared. Of a pair in leaks.csv the first picture is moved.
A picture goes to <input_dir>/quarantine/<split>/<class>/...; every call is a step of <input_dir>/quarantine.json
(moves.py), and --undo_quarantine takes back one call at a time, newest first.
"""

import csv
import os
from collections import Counter

from animals.command import UserError
from animals.pictures import moves
from animals.pictures.read import list_pictures
from config import Config

SHARE = 0.1  # of a class folder; a longer list is more likely wrong than the pictures


def manifest(input_dir: str) -> str:
    return os.path.join(input_dir, "quarantine.json")


def read_list(path: str) -> list[str]:
    """The column `image` of a CSV file, each picture once."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            columns = rows.fieldnames or []
            if "image" in columns:
                return list(dict.fromkeys(row["image"] for row in rows if row["image"]))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--quarantine {path}: found {error}; expected a CSV file with a column image") from None
    found = f"the columns {', '.join(columns)}" if columns else "an empty file"
    raise UserError(f"--quarantine {path}: found {found}; expected a CSV file with a column image")


def quarantine(config: Config, path: str, force: bool) -> dict[str, int]:
    """Move the pictures of a list; {"train_data/cat": n}. Raises UserError before the first move, or moves all."""
    images = read_list(path)
    names = [os.path.relpath(os.path.abspath(image), os.path.abspath(config.input_dir)) for image in images]
    strange = [
        image
        for image, name in zip(images, names, strict=True)
        if name.split(os.sep)[0] not in ("train_data", "validation_data")
        or name.count(os.sep) < 2
        or not os.path.lexists(os.path.join(config.input_dir, name))
    ]
    if strange:
        raise UserError(
            f"--quarantine {path}: found {len(strange):,} of {len(images):,} that are no pictures of a class there, "
            f"e.g. {strange[0]}; expected files of {config.input_dir}/{{train,validation}}_data/<class>/; make the "
            "list anew"
        )
    counts = Counter("/".join(name.split(os.sep)[:2]) for name in names)
    for folder, n in counts.items():
        there = len(list_pictures(os.path.join(config.input_dir, folder)))
        if n > SHARE * there and not force:
            raise UserError(
                f"--quarantine {path}: found {n:,} of the {there:,} pictures of {folder} in it; expected at most "
                f"{SHARE:.0%} of a class; look at the list, and if it is right add --force"
            )
    if names:
        steps = [(name, f"quarantine/{name.replace('_data', '', 1)}") for name in names]
        moves.start(manifest(config.input_dir), steps, {"list": os.path.abspath(path)})
    return dict(counts)
