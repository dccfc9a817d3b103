"""Pictures moved within input_dir and moved back: the one mechanism of the cut and of the quarantine.

A file is moved by one rename: it is never copied and never in both places. Before its first move every step is written
to the manifest of its kind, a JSON file in input_dir:

    {"finished": true, "steps": [{"said": ..., "created": [folder, ...], "moves": [[from, to], ...], ...}, ...]}

Paths are below input_dir. move() does nothing where it was done before. So a step that was killed (finished: false) is
finished by doing its moves again, or undone by doing them backwards. undo() takes back the newest step.
"""

import contextlib
import json
import os
from typing import NamedTuple

from animals.command import UserError
from animals.files import replacing
from config import Config


class Kind(NamedTuple):
    file: str  # the manifest
    script: str
    again: str  # arguments that move pictures
    back: str  # the flag that moves the pictures of the newest step back


CUT = Kind("validation_split.json", "data_process_utils.py", "--validation_fraction 0.2 --seed 42", "--undo_split")
QUARANTINE = Kind("quarantine.json", "scripts/quarantine.py", "temp/duplicates.csv", "--undo")
KINDS = {"cut": CUT, "quarantine": QUARANTINE}


def command(input_dir: str, kind: str, arguments: str) -> str:
    """The command line of a kind's script, for a message."""
    where = "" if input_dir == Config.input_dir else f" --input_dir {input_dir}"
    return f"python {KINDS[kind].script}{where} {arguments}".strip()


def manifest(input_dir: str, kind: str) -> str:
    return os.path.join(input_dir, KINDS[kind].file)


def read(input_dir: str, kind: str) -> dict:
    """The manifest; one without steps if it is not there."""
    path = manifest(input_dir, kind)
    if not os.path.exists(path):
        return {"finished": True, "steps": []}
    try:
        with open(path, encoding="utf-8") as file:
            plan = json.load(file)
        [(step["created"], step["moves"]) for step in plan["steps"]]
        return {"finished": bool(plan["finished"]), "steps": plan["steps"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: found {error!r}; expected a list of moves; restore the file") from None


def write(input_dir: str, kind: str, plan: dict) -> None:
    with replacing(manifest(input_dir, kind)) as file:
        json.dump(plan, file, indent=0, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())


def interrupted(input_dir: str) -> list[str]:
    """The kinds whose newest step was interrupted: every command that reads the pictures asks first."""
    return [kind for kind in KINDS if not read(input_dir, kind)["finished"]]


def require_finished(input_dir: str) -> None:
    """Before a new step: finish what was interrupted; raise UserError then, because today's arguments are not used."""
    lines = []
    for kind in interrupted(input_dir):
        back = command(input_dir, kind, KINDS[kind].back)
        lines.append(
            f"{manifest(input_dir, kind)}: found a {kind} that was interrupted; finished it ({finish(input_dir, kind)})"
            f"; expected none, so today's arguments were not used; give the command again, or take that back: {back}"
        )
    if lines:
        raise UserError("\n".join(lines))


def start(input_dir: str, kind: str, moves: list[tuple[str, str]], about: dict) -> None:
    """Do the moves as a new step; raise UserError before the first move, or do all.

    about: what the manifest says of the step beside its moves, at least `said`, a sentence.
    """
    linked = [os.path.join(input_dir, source) for source, _ in moves if behind_link(input_dir, source)]
    taken = [path for path in (os.path.join(input_dir, target) for _, target in moves) if os.path.lexists(path)]
    if linked:
        raise UserError(
            f"{linked[0]}: found {len(linked):,} pictures behind symbolic links; expected files, because they are "
            "moved; put the files themselves there, or move them by hand"
        )
    if taken:
        raise UserError(
            f"{taken[0]}: found {len(taken):,} files with names that pictures would be moved to; expected none; rename "
            "or remove them"
        )
    created = set()
    for folder in {os.path.dirname(target) for _, target in moves}:
        while not os.path.isdir(os.path.join(input_dir, folder)):
            created.add(folder)
            folder = os.path.dirname(folder)
        for source in {source.split("/")[0] for source, _ in moves}:
            there, here = (os.path.join(input_dir, name) for name in (folder, source))
            if os.stat(there).st_dev != os.stat(here).st_dev:
                raise UserError(
                    f"{there}: found another file system than that of {here}; expected the same one, because files are "
                    "moved by renaming; put both on one disk"
                )
    step = {**about, "created": sorted(created), "moves": moves}
    write(input_dir, kind, {"finished": False, "steps": [*read(input_dir, kind)["steps"], step]})
    finish(input_dir, kind)


def finish(input_dir: str, kind: str) -> str:
    """Do what is left of the newest step; return what it says of itself."""
    plan = read(input_dir, kind)
    step = plan["steps"][-1]
    for folder in step["created"]:
        os.makedirs(os.path.join(input_dir, folder), exist_ok=True)
    for source, target in step["moves"]:
        move(os.path.join(input_dir, source), os.path.join(input_dir, target))
    write(input_dir, kind, {**plan, "finished": True})
    return step["said"]


def undo(input_dir: str, kind: str) -> list[str]:
    """Take back the newest step, also a half-done one; return what to say, a line each."""
    plan, lost = read(input_dir, kind), []
    with contextlib.suppress(FileNotFoundError):
        os.remove(f"{manifest(input_dir, kind)}.part")  # left by a kill before the first move
    if not plan["steps"]:
        raise UserError(f"{manifest(input_dir, kind)}: not found; expected a list of moves; there is nothing to undo")
    step = plan["steps"].pop()
    check_not_moved_on(input_dir, kind, step)
    moves = [(os.path.join(input_dir, source), os.path.join(input_dir, target)) for source, target in step["moves"]]
    for source, target in moves:
        if os.path.lexists(source) and os.path.lexists(target):
            raise UserError(
                f"{source}: found a file where {target} would go back to; expected none; rename or remove one"
            )
    write(input_dir, kind, {"finished": False, "steps": [*plan["steps"], step]})
    for source, target in reversed(moves):
        if os.path.lexists(target) or os.path.lexists(source):
            os.makedirs(os.path.dirname(source), exist_ok=True)
            move(target, source)
        else:
            lost.append(target)
    for folder in sorted(step["created"], reverse=True):  # deepest first
        path = os.path.join(input_dir, folder)
        if os.path.isdir(path) and not os.listdir(path):
            os.rmdir(path)
    lines = [f"{len(moves) - len(lost):,} pictures are back where the {kind} took them from"]
    lines += [f"warning: {path}: no longer there, not put back" for path in lost]
    if plan["steps"]:
        write(input_dir, kind, {"finished": True, "steps": plan["steps"]})
        again = command(input_dir, kind, KINDS[kind].back)
        return [*lines, f"{len(plan['steps']):,} earlier ones remain; take the newest of them back: {again}"]
    os.remove(manifest(input_dir, kind))
    return lines


def check_not_moved_on(input_dir: str, kind: str, step: dict) -> None:
    """Raises UserError if the other kind has moved on what this step moved, e.g. a held-out picture to quarantine."""
    (other,) = KINDS.keys() - {kind}
    away = {source for later in read(input_dir, other)["steps"] for source, _ in later["moves"]}
    gone = [target for _, target in step["moves"] if target in away]
    if gone:
        raise UserError(
            f"{manifest(input_dir, kind)}: found {len(gone):,} pictures that a later {other} has moved on, e.g. "
            f"{gone[0]}; expected them where the {kind} has put them; put them back first: "
            f"{command(input_dir, other, KINDS[other].back)}"
        )


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
