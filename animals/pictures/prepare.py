"""The caches of the pictures, built where they are missing or out of date: what training and scoring ask first.

check_inputs() is called before anything slow starts, by the launcher even before `pip install`: this module imports
neither torch nor Pillow before it needs it.
"""

import os
import shlex
import sys
import unicodedata
from collections import Counter
from pathlib import Path

from animals.checkpoint.check import base_of, require_checkpoint
from animals.checkpoint.image_tokens import read_geometry
from animals.command import Findings, missing_package
from animals.files import deeper, is_hidden, looked_up, printable, subfolders
from animals.pictures.cache import SPLITS, cannot_list, lock, refresh, split_folder, temp_path
from config import Config

DATA_PAGE = "https://aistudio.baidu.com/datasetdetail/140388/0"
MOVES = {  # what moves pictures within input_dir (moves.py): manifest there, script, arguments, flag that moves back
    "cut": ("validation_split.json", "data_process_utils.py", "--validation_fraction 0.2 --seed 42", "--undo_split"),
    "quarantine": ("quarantine.json", "scripts/quarantine.py", "temp/duplicates.csv", "--undo"),
}


def check_inputs(config: Config, model_path: str, splits=SPLITS) -> dict[str, dict]:
    """The checkpoint's files are complete and the pictures fit for use, their caches built. Returns prepare()'s.

    Raises one UserError with a line for each problem, also for what is missing before `pip install`. Imports no torch.
    """
    findings = Findings()
    findings.attempt(require_checkpoint, model_path)
    try:
        summaries = findings.attempt(prepare, config, splits, base_of(model_path))
    except ModuleNotFoundError as error:  # before `pip install`
        if not (line := missing_package(error)):
            raise
        findings.append(line)
        findings += missing_folders(config, splits)
    findings.report()
    return summaries


def prepare(config: Config, splits=SPLITS, model_path: str = "model") -> dict[str, dict]:
    """Build the caches of `splits` that are missing or out of date; return a summary per split.

    Summary: n, classes {label: n}, folders {class folder: n}, excluded {reason: n}, ignored {kind of file: n},
    image_tokens {min, mean, max}, fingerprint (of contents and words, the same on every machine), json (size and time
    of the JSON), built (by this call), decoded (pictures), seconds, warnings (lines). Raises one UserError with a line
    for each problem of all the splits. Several processes may call it at once: one builds, the others wait. Imports no
    torch.
    """
    from animals.pictures import duplicates  # first of all, because it needs what `pip install` brings

    Findings(folder_problems(config, splits)).report()
    with lock(config):
        Findings(folder_problems(config, splits)).report()  # again: meanwhile pictures may have been moved
        entries = refresh(config, splits, read_geometry(model_path))
        facts = {split: {"json": entries[split]["json"], "built": "built" in entries[split]} for split in splits}
        summaries = {split: entries[split]["summary"] | facts[split] for split in splits}
        problems = [line for split in splits for line in split_problems(config, split, summaries[split])]
        if not problems:
            found = duplicates.read_duplicates(config, entries) or duplicates.search_duplicates(config, entries)
    built = [split for split in splits if summaries[split]["built"]]
    said = [line for split in built for line in notes(config, split, summaries[split])]
    if not problems and not config.allow_leaks:
        problems = duplicates.identical_problems(config, found, splits)
    if built and not problems:
        said += duplicates.describe_duplicates(config, found)
    for line in said:
        print(line, file=sys.stderr, flush=True)
    Findings(problems).report()
    return summaries


def commands(input_dir: str, kind: str) -> tuple[str, str, str]:
    """Command lines for a message: the script of MOVES[kind] alone, to move pictures, to move the last ones back."""
    _, script, arguments, back = MOVES[kind]
    script = f"python {script}" if input_dir == Config.input_dir else f"python {script} --input_dir {input_dir}"
    return script, f"{script} {arguments}", f"{script} {back}"


def manifest(input_dir: str, kind: str) -> Path:
    return Path(input_dir, MOVES[kind][0])


def interrupted(input_dir: str) -> list[str]:
    """The kinds of moves whose newest step was interrupted, or whose manifest is damaged (moves.py says how)."""
    paths = {kind: manifest(input_dir, kind) for kind in MOVES}
    return [kind for kind, path in paths.items() if path.is_file() and b'"finished": true' not in path.read_bytes()]


def folder_problems(config: Config, splits) -> list[str]:
    """What is wrong with the folders themselves, a line per problem, before any picture is read."""
    problems = []
    for kind in interrupted(config.input_dir):
        _, again, back = commands(config.input_dir, kind)
        path = manifest(config.input_dir, kind)
        problems.append(f"{path}: found a {kind} that was interrupted; finish it: {again}; or take it back: {back}")
    for split in () if problems else splits:  # half-moved folders say nothing more
        problems += missing_folders(config, [split]) or class_problems(config, split_folder(config, split))
    return problems


def missing_folders(config: Config, splits) -> list[str]:
    """A line for each split without a folder: what was found instead, and what to do."""
    try:
        there = sorted(printable(name) for name in os.listdir(config.input_dir) if not is_hidden(name))
        found = f"{config.input_dir} holds {', '.join(there[:8]) or 'nothing'}{', ...' if there[8:] else ''}"
        found += deeper(config.input_dir)
    except OSError:
        found = f"{looked_up(config.input_dir)} does not exist either"
    _, cut, _ = commands(config.input_dir, "cut")
    ways = {
        "train": f"expected one folder of pictures per class: {', '.join(config.folder_to_label)}; put the training "
        f"pictures there (the ten animals of the README: {DATA_PAGE}), or name another folder with --input_dir",
        "validation": "expected the same class folders as in train_data, with pictures that training does not see; "
        f"cut it off the training pictures: {cut}",
    }
    missing = [split for split in splits if not os.path.isdir(split_folder(config, split))]
    return [f"{split_folder(config, split)}: not found ({found}); {ways[split]}" for split in missing]


def class_problems(config: Config, root: str) -> list[str]:
    """What is wrong with the class folders in the folder of a split."""
    from animals.pictures.read import EXTENSIONS, walk

    problems, known, table = [], [], ", ".join(config.folder_to_label)
    try:
        for folder in subfolders(root):
            path, strays = os.path.join(root, folder), Counter()
            if folder not in config.folder_to_label or printable(folder) != folder:
                problems.append(unknown_class(config, root, folder))
                continue
            known.append(folder)
            if next(walk(path, strays), None) is None:
                found = f"found no picture ({counted(strays) or 'empty'}); expected at least one file"
                problems.append(f"{path}: {found} {', '.join(EXTENSIONS)}; add pictures or remove the folder")
    except OSError as error:
        return [*problems, cannot_list(error, root)]
    if len(known) < 2 and known == subfolders(root):
        found = f"found {len(known)} class folders ({', '.join(known) or 'none'}); expected at least two of {table}"
        problems.append(f"{root}: {found}; put the pictures there, one folder per class")
    return problems


def unknown_class(config: Config, root: str, folder: str) -> str:
    """What is wrong with a folder that is no class, and the way out."""
    path, table = os.path.join(root, folder), config.folder_to_label
    if printable(folder) != folder:
        return f"{root}: found a class folder {folder!r}; expected a name without control characters; rename it"
    inside = subfolders(path)
    if table.keys() & {*inside}:
        names = ", ".join(map(printable, inside[:4]))
        return f"{path}: found the class folders {names} in it; expected them in {root}; move them there"
    for name in table:
        if unicodedata.normalize("NFC", name) == unicodedata.normalize("NFC", folder):
            why = "a Mac takes accents apart: Unicode NFD and NFC"
            found = f"other bytes for the same letters than in the label table ({why}); expected the same ones"
            return f"{path}: found {found}; {shlex.join(['mv', path, os.path.join(root, name)])}"
    found, way = "a class folder that is not in the label table", "add it to FOLDER_TO_LABEL in config.py"
    if root == split_folder(config, "validation") and all(name == label for name, label in table.items()):
        found, there = "a class that training does not have", os.path.join(split_folder(config, "train"), folder)
        way = f"put pictures of it in {there} too"
    return f"{path}: found {found}; expected one of {', '.join(table)}; rename it, move it away, or {way}"


def split_problems(config: Config, split: str, summary: dict) -> list[str]:
    """What the check found that training must not start with."""
    root, excluded = split_folder(config, split), temp_path(config, "excluded.csv")
    lost, folders = sum(summary["excluded"].values()), [folder for folder, n in summary["folders"].items() if n == 0]
    way = f"add pictures or remove the folder ({excluded} lists what was excluded)"
    problems = [f"{root}/{folder}: found no usable picture; expected at least one; {way}" for folder in folders]
    if lost > config.max_excluded * (summary["n"] + lost):
        found = f"found {lost:,} of {summary['n'] + lost:,} pictures unusable ({counted(summary['excluded'])})"
        way = f"mend or remove those in {excluded}, or raise --max_excluded"
        problems.append(f"{root}: {found}; expected at most {config.max_excluded:.1%}; {way}")
    return problems


def counted(counts: dict) -> str:
    return ", ".join(f"{key} {n:,}" for key, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def notes(config: Config, split: str, summary: dict) -> list[str]:
    """What was done and what was left out, a line each."""
    found = summary["n"] + sum(summary["excluded"].values())
    lines = [f"{split}: {found:,} pictures checked in {summary['seconds']} s, {summary['decoded']:,} of them decoded"]
    if summary["excluded"]:
        lines.append(f"{split}: excluded {counted(summary['excluded'])}; listed in {temp_path(config, 'excluded.csv')}")
    if summary["ignored"]:
        lines.append(f"{split}: ignored files that are not pictures: {counted(summary['ignored'])}")
    return lines + [f"warning: {line}" for line in summary["warnings"]]
