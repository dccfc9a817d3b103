"""Pictures moved within input_dir and moved back: the one mechanism of the cut and of the quarantine.

A file is moved by one rename: it is never copied and never in both places. Before its first move every step is written
to the manifest of its kind (MOVES in prepare.py), a JSON file in input_dir:

    {"finished": true, "steps": [{"said": ..., "created": [folder, ...], "moves": [[from, to], ...], ...}, ...]}

Paths are below input_dir. move() does nothing where it was done before. So a step that was killed (finished: false) is
finished by doing its moves again, or undone by doing them backwards. undo() takes back the newest step.
"""

import json
import os
from pathlib import Path

from animals.command import Findings, UserError
from animals.files import nearest_existing, replacing, require_writable
from animals.pictures.prepare import MOVES, commands, interrupted, manifest


def read_moves(input_dir: str, kind: str) -> dict:
    """The manifest of MOVES[kind]: its `steps`, and whether the newest one is `finished`."""
    path = manifest(input_dir, kind)
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        [(step["created"], step["moves"]) for step in plan["steps"]]
        return {"finished": plan["finished"], "steps": plan["steps"]}
    except (FileNotFoundError, NotADirectoryError):
        return {"finished": True, "steps": []}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: found {error!r}; expected a list of moves; restore the file") from None


def write(input_dir: str, kind: str, finished: bool, steps: list[dict]) -> None:
    with replacing(manifest(input_dir, kind)) as file:
        json.dump({"finished": finished, "steps": steps}, file, indent=0, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())


def require_finished(input_dir: str) -> None:
    """Before a new step: finish what was interrupted; raise UserError then, because today's arguments are not used."""
    findings = Findings()
    for kind in interrupted(input_dir):
        found = f"found a {kind} that was interrupted; finished it ({finish(input_dir, kind)})"
        way = f"give the command again, or take that back: {commands(input_dir, kind)[2]}"
        expected = "expected none, so today's arguments were not used"
        findings.append(f"{manifest(input_dir, kind)}: {found}; {expected}; {way}")
    findings.report()


def start(input_dir: str, kind: str, moves: list[tuple[str, str]], about: dict) -> None:
    """Do the moves as a new step; raise UserError before the first move, or do all.

    about: what the manifest says of the step beside its moves, at least `said`, a sentence.
    """
    root = Path(input_dir)
    if linked := [name for name, _ in moves if any((root / p).is_symlink() for p in (name, *Path(name).parents[:-1]))]:
        found = f"found {len(linked):,} pictures behind symbolic links; expected files; put them there"
        raise UserError(f"{root / linked[0]}: {found}")
    if taken := [root / target for _, target in moves if os.path.lexists(root / target)]:
        found = f"found {len(taken):,} files with names that pictures would be moved to; expected none"
        raise UserError(f"{taken[0]}: {found}; rename or remove them")
    require_places(root, moves)
    folders = {str(folder) for _, target in moves for folder in Path(target).parents}
    created = sorted(folder for folder in folders if not (root / folder).is_dir())
    step = {**about, "created": created, "moves": moves}
    write(input_dir, kind, False, [*read_moves(input_dir, kind)["steps"], step])
    finish(input_dir, kind)


def require_places(root: Path, moves) -> None:
    """Raises UserError unless files can be made in all folders of `moves` [(source, target)], all on one disk."""
    places = sorted({nearest_existing((root / name).parent) for pair in moves for name in pair})
    for place in places:
        require_writable("--input_dir", place)
        if place.stat().st_dev != places[0].stat().st_dev:
            found = f"another file system than that of {places[0]}; expected the same one, because files are renamed"
            raise UserError(f"{place}: found {found}; put both on one disk")


def finish(input_dir: str, kind: str) -> str:
    """Do what is left of the newest step; return what it says of itself."""
    steps = read_moves(input_dir, kind)["steps"]
    require_places(Path(input_dir), steps[-1]["moves"])
    for folder in steps[-1]["created"]:
        os.makedirs(Path(input_dir, folder), exist_ok=True)
    for source, target in steps[-1]["moves"]:
        move(Path(input_dir, source), Path(input_dir, target))
    write(input_dir, kind, True, steps)
    return steps[-1]["said"]


def undo(input_dir: str, kind: str) -> list[str]:
    """Take back the newest step, also a half-done one; return what to say, a line each."""
    root, path, lost = Path(input_dir), manifest(input_dir, kind), []
    Path(f"{path}.part").unlink(missing_ok=True)  # left by a kill before the first move
    steps = read_moves(input_dir, kind)["steps"]
    if not steps:
        raise UserError(f"{path}: not found; expected a list of moves; there is nothing to undo")
    *earlier, step = steps
    (other,) = MOVES.keys() - {kind}  # which may have moved them on, e.g. a held-out picture to quarantine
    away = {source for later in read_moves(input_dir, other)["steps"] for source, _ in later["moves"]}
    if gone := [target for _, target in step["moves"] if target in away]:
        found = f"found {len(gone):,} pictures that a later {other} has moved on, e.g. {gone[0]}"
        back = f"put them back first: {commands(input_dir, other)[2]}"
        raise UserError(f"{path}: {found}; expected them where the {kind} has put them; {back}")
    require_places(root, step["moves"])
    moves = [(root / source, root / target) for source, target in step["moves"]]
    for source, target in moves:
        if os.path.lexists(source) and os.path.lexists(target):
            raise UserError(f"{source}: found a file where {target} would go; expected none; rename or remove one")
    write(input_dir, kind, False, steps)
    for source, target in reversed(moves):
        if os.path.lexists(target) or os.path.lexists(source):
            source.parent.mkdir(parents=True, exist_ok=True)
            move(target, source)
        else:
            lost.append(target)
    for folder in sorted(step["created"], reverse=True):  # deepest first
        if (root / folder).is_dir() and not os.listdir(root / folder):
            (root / folder).rmdir()
    lines = [f"{len(moves) - len(lost):,} pictures are back where the {kind} took them from"]
    lines += [f"warning: {target}: no longer there, not put back" for target in lost]
    if not earlier:
        path.unlink()
        return lines
    write(input_dir, kind, True, earlier)
    _, _, again = commands(input_dir, kind)
    return [*lines, f"{len(earlier):,} earlier ones remain; take the newest of them back: {again}"]


def move(source: Path, target: Path) -> None:
    """Rename unless it was done before; never over another file."""
    if not os.path.lexists(source):
        if os.path.lexists(target):
            return
        raise UserError(f"{source}: not found, nor {target}; expected one of them; put the file back")
    if os.path.lexists(target):
        raise UserError(f"{target}: found a file where {source} would go; expected none; rename or remove one")
    os.rename(source, target)
