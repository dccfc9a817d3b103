"""Cut a validation split off train_data, and put it back. Called by data_process_utils.py:

    python data_process_utils.py --validation_fraction 0.2 --seed 42
    python data_process_utils.py --undo_split

The cut moves round(fraction * n) pictures of each class folder, at least one, never all. Which ones depends on the
seed and on the pictures' pixels only, not on their names or their order on the disk. Pictures that are the same or
near-duplicates of each other (leaks.py) go together, so a class of many look-alikes may get a smaller share.

Every cut is a step of <input_dir>/validation_split.json (moves.py): a killed cut is finished by the next one or undone
by --undo_split, which takes back one cut at a time, newest first.
"""

import hashlib
import os
from collections import Counter, defaultdict

from animals.command import UserError
from animals.pictures import moves


def manifest(input_dir: str) -> str:
    return os.path.join(input_dir, "validation_split.json")


def choose(pictures, fraction: float, seed: int) -> list[str]:
    """The names to move, sorted. `pictures`: (name, class folder, pixel hash, group, already held out) each.

    Groups are taken in the order of a hash of seed and pixels, each if no class then exceeds its share. Groups with a
    member that is already held out come first, whatever they cost: they belong on that side.
    """
    groups, sizes = defaultdict(list), Counter()
    forced = set()
    for name, folder, pixels, group, held in pictures:
        if held:
            forced.add(group)
        else:
            groups[group].append((name, folder, pixels))
            sizes[folder] += 1
    share = {folder: min(max(round(fraction * n), 1), n - 1) for folder, n in sizes.items()}

    def rank(group):
        return hashlib.sha256(f"{seed} {min(pixels for _, _, pixels in groups[group])}".encode()).digest()

    chosen, taken = [], Counter()
    for group in sorted(groups, key=lambda group: (group not in forced, rank(group))):
        cost = Counter(folder for _, folder, _ in groups[group])
        if group in forced or all(taken[folder] + n <= share[folder] for folder, n in cost.items()):
            taken += cost
            chosen += [name for name, _, _ in groups[group]]
    return sorted(chosen)


def cut(input_dir: str, names: list[str], about: dict) -> None:
    """Move `names` (below train_data) to validation_data. Raises UserError before the first move, or moves all."""
    moves.start(manifest(input_dir), [(f"train_data/{name}", f"validation_data/{name}") for name in names], about)


def check_fraction(fraction: float) -> None:
    if not 0 < fraction < 1:
        raise UserError(f"--validation_fraction: found {fraction}; expected a share between 0 and 1, e.g. 0.2")
