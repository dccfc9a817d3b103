"""Pictures moved within input_dir and put back: what the cut (split.py) and the quarantine (quarantine.py) share.

A file is moved by one rename: it is never copied and never in both places. Every step is written to a manifest, a JSON
file in input_dir, before its first move:

    {"finished": true, "steps": [{"said": ..., "created": [folder, ...], "moves": [[from, to], ...], ...}, ...]}

Paths are below input_dir. move() does nothing where it was done before, so a step that was killed (finished: false) is
ended by doing its moves again, or undone by doing them backwards; undo() takes back the newest step.
"""

import contextlib
import json
import os

from animals.command import UserError
from animals.files import replacing


def read(manifest: str) -> dict:
    """The manifest; one without steps if it is not there."""
    if not os.path.exists(manifest):
        return {"finished": True, "steps": []}
    try:
        with open(manifest, encoding="utf-8") as file:
            plan = json.load(file)
        [(step["created"], step["moves"]) for step in plan["steps"]]
        return {"finished": bool(plan["finished"]), "steps": plan["steps"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{manifest}: found {error!r}; expected a list of moves; restore the file") from None


def unfinished(manifest: str) -> bool:
    """Whether a step was interrupted: every command that reads the pictures asks first."""
    return not read(manifest)["finished"]


def write(manifest: str, plan: dict) -> None:
    with replacing(manifest) as file:
        json.dump(plan, file, indent=0, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())


def start(manifest: str, moves: list[tuple[str, str]], about: dict) -> None:
    """Do the moves as a new step. Raises UserError before the first one, or does all."""
    root = os.path.dirname(manifest)
    linked = [source for source, _ in moves if behind_link(root, source)]
    taken = [target for _, target in moves if os.path.lexists(os.path.join(root, target))]
    if linked:
        raise UserError(
            f"{os.path.join(root, linked[0])}: found {len(linked):,} pictures behind symbolic links; expected files, "
            f"because they are moved; put the files themselves there, or move them by hand"
        )
    if taken:
        raise UserError(
            f"{os.path.join(root, taken[0])}: found {len(taken):,} files with names that pictures would be moved to; "
            "expected none; rename or remove them"
        )
    created = set()
    for folder in {os.path.dirname(target) for _, target in moves}:
        while not os.path.isdir(os.path.join(root, folder)):
            created.add(folder)
            folder = os.path.dirname(folder)
        for source in {source.split("/")[0] for source, _ in moves}:
            if os.stat(os.path.join(root, folder)).st_dev != os.stat(os.path.join(root, source)).st_dev:
                raise UserError(
                    f"{os.path.join(root, folder)}: found another file system than that of "
                    f"{os.path.join(root, source)}; expected the same one, because files are moved by renaming; put "
                    "both on one disk"
                )
    plan = read(manifest)
    plan["steps"].append({**about, "created": sorted(created), "moves": moves})
    write(manifest, {**plan, "finished": False})
    finish(manifest)


def finish(manifest: str) -> dict:
    """Do what is left of the newest step, and return it."""
    root, plan = os.path.dirname(manifest), read(manifest)
    for folder in plan["steps"][-1]["created"]:
        os.makedirs(os.path.join(root, folder), exist_ok=True)
    for source, target in plan["steps"][-1]["moves"]:
        move(os.path.join(root, source), os.path.join(root, target))
    write(manifest, {**plan, "finished": True})
    return plan["steps"][-1]


def undo(manifest: str) -> tuple[int, list[str]]:
    """Take back the newest step, also a half-done one. The number put back, and what was no longer there."""
    root, plan, lost = os.path.dirname(manifest), read(manifest), []
    with contextlib.suppress(FileNotFoundError):
        os.remove(f"{manifest}.part")  # killed before the first move
    if not plan["steps"]:
        raise UserError(f"{manifest}: not found; expected a list of moves; there is nothing to undo")
    step = plan["steps"].pop()
    moves = [(os.path.join(root, source), os.path.join(root, target)) for source, target in step["moves"]]
    for source, target in moves:
        if os.path.lexists(source) and os.path.lexists(target):
            raise UserError(
                f"{source}: found a file where {target} would go back to; expected none; rename or remove one"
            )
    write(manifest, {"finished": False, "steps": [*plan["steps"], step]})
    for source, target in reversed(moves):
        if os.path.lexists(target) or os.path.lexists(source):
            os.makedirs(os.path.dirname(source), exist_ok=True)
            move(target, source)
        else:
            lost.append(target)
    for folder in sorted(step["created"], reverse=True):  # deepest first
        path = os.path.join(root, folder)
        if os.path.isdir(path) and not os.listdir(path):
            os.rmdir(path)
    if plan["steps"]:
        write(manifest, {"finished": True, "steps": plan["steps"]})
    else:
        os.remove(manifest)
    return len(moves) - len(lost), lost


def move(source: str, target: str) -> None:
    """Rename unless it was done before; never over another file."""
    if not os.path.lexists(source):
        if os.path.lexists(target):
            return
        raise UserError(f"{source}: not found, nor {target}; expected one of them; put the file back")
    if os.path.lexists(target):
        raise UserError(f"{target}: found a file where {source} would go; expected none; rename or remove one")
    os.rename(source, target)


def behind_link(root: str, name: str) -> bool:
    """Whether a path below root goes through a symbolic link."""
    parts = name.split("/")
    return any(os.path.islink(os.path.join(root, *parts[: k + 1])) for k in range(len(parts)))
