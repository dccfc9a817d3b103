"""Move pictures out of the splits without deleting any, and put them back.

    python scripts/quarantine.py temp/duplicates.csv
    python scripts/quarantine.py --undo

The list is a CSV file with a column `image`, paths as in train.json: duplicates.csv, audit.csv and excluded.csv as they
are, or without the rows of those pictures that look right to you. Of a pair in duplicates.csv the first one is moved.
A picture goes to <input_dir>/quarantine/<split>/<class>/...; every call is a step of <input_dir>/quarantine.json
(animals/pictures/moves.py), and --undo takes back one call at a time, newest first.
"""

import csv
import os
import sys
from collections import Counter

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import config as settings
from animals.command import UserError, run
from animals.pictures import moves
from animals.pictures.cache import lock
from animals.pictures.prepare import commands
from animals.pictures.read import list_pictures
from config import Config

SHARE = 0.1  # of a class folder; it is more likely that a longer list is wrong than that so many pictures are


def read_list(path: str) -> list[str]:
    """The column `image` of a CSV file, each picture once."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            columns = rows.fieldnames or []
            if "image" in columns:
                return list(dict.fromkeys(row["image"] for row in rows if row["image"]))
        found = f"the columns {', '.join(columns)}" if columns else "an empty file"
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        found = error
    raise UserError(f"{path}: found {found}; expected a CSV file with a column image")


def quarantine(config: Config, path: str, force: bool) -> dict[str, int]:
    """Move the pictures of a list; {"train_data/cat": n}. Raises UserError before the first move, or moves all."""
    moves.require_finished(config.input_dir)
    images = read_list(path)
    names = {os.path.relpath(os.path.abspath(image), os.path.abspath(config.input_dir)): image for image in images}
    strange = [
        image
        for name, image in names.items()
        if name.split(os.sep)[0] not in ("train_data", "validation_data")
        or name.count(os.sep) < 2
        or not os.path.lexists(os.path.join(config.input_dir, name))
    ]
    if strange:
        raise UserError(
            f"{path}: found {len(strange):,} of {len(names):,} that are not pictures of a class there, e.g. "
            f"{strange[0]}; expected files of {config.input_dir}/{{train,validation}}_data/<class>/; make the list anew"
        )
    counts = Counter("/".join(name.split(os.sep)[:2]) for name in names)
    for folder, n in counts.items():
        there = len(list_pictures(os.path.join(config.input_dir, folder)))
        if n > SHARE * there and not force:
            raise UserError(
                f"{path}: found {n:,} of the {there:,} pictures of {folder} in it; expected at most {SHARE:.0%} of a "
                "class; look at the list, and if it is right add --force"
            )
    if names:
        pairs = [(name, f"quarantine/{name.replace('_data', '', 1)}") for name in names]
        said = f"{len(pairs):,} pictures moved to {os.path.join(config.input_dir, 'quarantine')}"
        moves.start(config.input_dir, "quarantine", pairs, {"list": os.path.abspath(path), "said": said})
    return dict(counts)


def main():
    parser = settings.parser(__doc__.partition("\n")[0], ("input_dir", "temp_dir"))
    either = parser.add_mutually_exclusive_group(required=True)
    either.add_argument("list", nargs="?", metavar="LIST.csv", help="move the pictures in its column image away")
    either.add_argument("--undo", action="store_true", help="move the pictures of the newest quarantine back")
    parser.add_argument("--force", action="store_true", help="allow that more than 10 %% of a class are moved")
    args = parser.parse_args()
    config = settings.config_from(args)
    with lock(config, moving=True):
        if args.undo:
            print("\n".join(moves.undo(config.input_dir, "quarantine")))
            return
        counts = quarantine(config, args.list, args.force)
    for folder, n in sorted(counts.items()):
        print(f"{folder:30} {n:>8,}")
    *_, back = commands(config.input_dir, "quarantine")
    print(f"{sum(counts.values()):,} pictures moved to {config.input_dir}/quarantine; to take it back: {back}")


if __name__ == "__main__":
    run(main)
