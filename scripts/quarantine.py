"""Move pictures out of the splits without deleting any, and put them back.

    python scripts/quarantine.py temp/duplicates.csv
    python scripts/quarantine.py --undo

The list is a CSV file with a column `image`, paths as in train.json: duplicates.csv, audit.csv and excluded.csv as they
are, as a spreadsheet saves them, or without the rows of those pictures that look right to you. Only training pictures
are moved: with fewer held-out pictures, and just those gone that the model finds hard, the accuracy would look better
than it is. --held_out_too moves the held-out ones of the list as well, and every report then says the accuracy with
them too. Of a pair in duplicates.csv the first picture is moved, of a pair in both splits the training picture.
A picture goes to <input_dir>/quarantine/<split>/<class>/...; every call is a step of <input_dir>/quarantine.json
(animals/pictures/moves.py), and --undo takes back one call at a time, newest first.
"""

import os
import re
import sys
from collections import Counter

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import config as settings
from animals.command import UserError, run
from animals.files import read_csv
from animals.pictures import moves
from animals.pictures.cache import lock
from animals.pictures.prepare import commands
from animals.pictures.read import list_pictures
from config import Config

SHARE = 0.1  # of a class folder; it is more likely that a longer list is wrong than that so many pictures are


def read_list(path: str) -> list[str]:
    """The pictures that a CSV file lists, each once: `image`, or `other_image` if only that one is in train."""
    try:
        columns, rows = read_csv(path)
    except OSError as error:
        raise UserError(f"{path}: found {error.strerror}; expected a CSV file with a column image") from None
    rows = [{column.strip().lower(): cell for column, cell in row.items()} for row in rows]
    if "image" not in [column.strip().lower() for column in columns]:
        found = f"the columns {', '.join(columns)}" if columns else "an empty file"
        raise UserError(f"{path}: found {found}; expected a CSV file with a column image")
    across = [(row.get("split"), row.get("other_split")) == ("validation", "train") for row in rows]
    listed = [row.get("other_image" if pair else "image") for row, pair in zip(rows, across, strict=True)]
    return [image for image in dict.fromkeys(listed) if image]


def quarantine(config: Config, path: str, force: bool, held_out_too: bool = False) -> tuple[dict[str, int], int]:
    """Move the pictures of a list. Returns {"train_data/cat": n}, and how many held-out pictures were left.

    Pictures that an earlier call has moved are passed over. Raises UserError before the first move, or moves all.
    """
    moves.require_finished(config.input_dir)
    root = os.path.abspath(config.input_dir)

    def there(name):
        return os.path.lexists(os.path.join(root, name))

    names = {os.path.relpath(os.path.abspath(image), root): image for image in read_list(path)}
    targets = {name: f"quarantine/{name.replace('_data', '', 1)}" for name in names}
    names = {name: image for name, image in names.items() if there(name) or not there(targets[name])}
    in_class = re.compile("(train|validation)_data/.*/")
    strange = [image for name, image in names.items() if not in_class.match(name) or not there(name)]
    if strange:
        raise UserError(
            f"{path}: found {len(strange):,} of {len(names):,} that are not pictures of a class there, e.g. "
            f"{strange[0]}; expected files of {config.input_dir}/{{train,validation}}_data/<class>/; make the list anew"
        )
    wanted = [name for name in names if held_out_too or not name.startswith("validation_data")]
    counts = Counter("/".join(name.split(os.sep)[:2]) for name in wanted)
    for folder, n in counts.items():
        total = len(list_pictures(os.path.join(config.input_dir, folder)))
        if n > SHARE * total and not force:
            raise UserError(
                f"{path}: found {n:,} of the {total:,} pictures of {folder} in it; expected at most {SHARE:.0%} of a "
                "class; look at the list, and if it is right add --force"
            )
    if wanted:
        pairs = [(name, targets[name]) for name in wanted]
        said = f"{len(pairs):,} pictures moved to {os.path.join(config.input_dir, 'quarantine')}"
        moves.start(config.input_dir, "quarantine", pairs, {"list": os.path.abspath(path), "said": said})
    return dict(counts), len(names) - len(wanted)


def main():
    parser = settings.parser(__doc__.partition("\n")[0], ("input_dir", "temp_dir"))
    either = parser.add_mutually_exclusive_group(required=True)
    either.add_argument("list", nargs="?", metavar="LIST.csv", help="move the pictures in its column image away")
    either.add_argument("--undo", action="store_true", help="move the pictures of the newest quarantine back")
    parser.add_argument("--force", action="store_true", help="allow that more than 10 %% of a class are moved")
    parser.add_argument("--held_out_too", action="store_true", help="move the list's held-out pictures as well")
    args = parser.parse_args()
    config = settings.config_from(args)
    with lock(config, moving=True):
        if args.undo:
            print("\n".join(moves.undo(config.input_dir, "quarantine")))
            return
        counts, left = quarantine(config, args.list, args.force, args.held_out_too)
    for folder, n in sorted(counts.items()):
        print(f"{folder:30} {n:>8,}")
    if left:
        print(f"{left:,} held-out pictures of the list stay where they are; --held_out_too moves them as well")
    back = f"; to take it back: {commands(config.input_dir, 'quarantine')[-1]}" if counts else ""
    print(f"{sum(counts.values()):,} pictures moved to {config.input_dir}/quarantine{back}")


if __name__ == "__main__":
    run(main)
