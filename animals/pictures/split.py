"""Cut a validation split off train_data, and put it back. Called by data_process_utils.py:

    python data_process_utils.py --validation_fraction 0.2 --seed 42
    python data_process_utils.py --undo_split

The cut moves round(fraction * n) pictures of each class folder, at least one, never all. Which ones depends on the
seed and on the pictures' pixels only, not on their names or their order on the disk. Pictures that are the same or
near-duplicates of each other (leaks.py) go together, so a class of many look-alikes may get a smaller share.

A file is moved by one rename: it is never copied and never in both places. Where the cut stands is the name of its
manifest in input_dir, a JSON file with every move, written before the first one:

    validation_split.pending.json     moving; after a kill the next cut finishes it, or --undo_split undoes it
    validation_split.json             done; --undo_split reads it
    validation_split.undoing.json     being undone; the next cut or --undo_split goes on with that
"""

import hashlib
import json
import math
import os
from collections import Counter, defaultdict

from animals.command import UserError

STATES = ("pending", "undoing")


def manifest(input_dir: str, state: str = "") -> str:
    return os.path.join(input_dir, f"validation_split.{state}.json" if state else "validation_split.json")


def unfinished(input_dir: str) -> str | None:
    """The manifest of a cut that was interrupted."""
    return next((path for state in STATES if os.path.exists(path := manifest(input_dir, state))), None)


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
    train, held = os.path.join(input_dir, "train_data"), os.path.join(input_dir, "validation_data")
    linked = [name for name in names if behind_link(train, name)]
    taken = [name for name in names if os.path.lexists(os.path.join(held, name))]
    if linked:
        raise UserError(
            f"{os.path.join(train, linked[0])}: found {len(linked):,} pictures behind symbolic links; expected files, "
            f"because the cut moves them; put the files themselves into {train}, or fill {held} by hand"
        )
    if taken:
        raise UserError(
            f"{os.path.join(held, taken[0])}: found {len(taken):,} files with names that the cut would use; "
            "expected none; rename or remove them"
        )
    folders = {os.path.dirname(os.path.join(held, name)) for name in names}
    created = set()
    for folder in folders:
        while not os.path.isdir(folder):
            created.add(folder)
            folder = os.path.dirname(folder)
        if os.stat(folder).st_dev != os.stat(train).st_dev:
            raise UserError(
                f"{folder}: found another file system than {train}'s; expected the same one, because the cut moves "
                "files by renaming; put both on one disk"
            )
    before = read(manifest(input_dir)) if os.path.exists(manifest(input_dir)) else {"moves": [], "created": []}
    plan = {
        **about,
        "created": before["created"] + sorted(os.path.relpath(folder, input_dir) for folder in created),
        "finished": len(before["moves"]),
        "moves": before["moves"] + [[f"train_data/{name}", f"validation_data/{name}"] for name in names],
    }
    pending = manifest(input_dir, "pending")
    with open(f"{pending}.part", "w", encoding="utf-8") as file:
        json.dump(plan, file, indent=0, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{pending}.part", pending)
    finish_cut(input_dir)


def finish_cut(input_dir: str) -> dict:
    """Do what is left of a pending cut."""
    plan = read(manifest(input_dir, "pending"))
    for folder in plan["created"]:
        os.makedirs(os.path.join(input_dir, folder), exist_ok=True)
    for source, target in plan["moves"][plan["finished"] :]:
        move(os.path.join(input_dir, source), os.path.join(input_dir, target))
    os.replace(manifest(input_dir, "pending"), manifest(input_dir))
    return plan


def undo(input_dir: str) -> tuple[int, list[str]]:
    """Take the last cut back, also a half-done cut or undo. The number put back, and what was no longer there."""
    undoing = manifest(input_dir, "undoing")
    part = manifest(input_dir, "pending") + ".part"
    if os.path.exists(part):  # killed before the first move
        os.remove(part)
    if not os.path.exists(undoing):
        path = manifest(input_dir, "pending") if unfinished(input_dir) else manifest(input_dir)
        if not os.path.exists(path):
            raise UserError(f"{path}: not found; expected the manifest of a cut; there is nothing to undo")
        for source, target in read(path)["moves"]:
            source, target = os.path.join(input_dir, source), os.path.join(input_dir, target)
            if os.path.lexists(source) and os.path.lexists(target):
                raise UserError(
                    f"{source}: found a file where {target} would go back to; expected none; rename or remove one"
                )
        os.replace(path, undoing)
    plan, lost = read(undoing), []
    for source, target in reversed(plan["moves"]):
        source, target = os.path.join(input_dir, source), os.path.join(input_dir, target)
        if os.path.lexists(target) or os.path.lexists(source):
            os.makedirs(os.path.dirname(source), exist_ok=True)
            move(target, source)
        else:
            lost.append(target)
    for folder in sorted(plan["created"], reverse=True):  # deepest first
        path = os.path.join(input_dir, folder)
        if os.path.isdir(path) and not os.listdir(path):
            os.rmdir(path)
    if os.path.exists(manifest(input_dir)):  # of an earlier cut that this one was added to: its moves are in the plan
        os.remove(manifest(input_dir))
    os.remove(undoing)
    return len(plan["moves"]) - len(lost), lost


def move(source: str, target: str) -> None:
    """Rename unless it was done before; never over another file."""
    if not os.path.lexists(source):
        if os.path.lexists(target):
            return
        raise UserError(f"{source}: not found, nor {target}; expected one of them; put the file back")
    if os.path.lexists(target):
        raise UserError(f"{target}: found a file where {source} would go; expected none; rename or remove one")
    os.rename(source, target)


def read(path: str) -> dict:
    try:
        with open(path, encoding="utf-8") as file:
            plan = json.load(file)
        return {"created": plan["created"], "moves": plan["moves"], **plan}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: found {error!r}; expected the manifest of a cut; restore the file") from None


def behind_link(root: str, name: str) -> bool:
    """Whether a path below root goes through a symbolic link."""
    parts = name.split("/")
    return any(os.path.islink(os.path.join(root, *parts[: k + 1])) for k in range(len(parts)))


def check_fraction(fraction: float) -> None:
    if not 0 < fraction < 1 or math.isnan(fraction):
        raise UserError(f"--validation_fraction: found {fraction}; expected a share between 0 and 1, e.g. 0.2")
