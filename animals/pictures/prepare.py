"""The caches of the pictures, built where they are missing or stale: what training and scoring ask first."""

import os
import sys
from collections import Counter
from pathlib import Path

from animals.checkpoint.tokens import Geometry, read_geometry
from animals.command import UserError
from animals.files import subfolders
from animals.pictures import moves
from animals.pictures.cache import (
    SPLITS,
    build,
    cannot_list,
    fresh_meta,
    fresh_summary,
    lock,
    split_folder,
)
from animals.pictures.quarantine import manifest as quarantine_manifest
from animals.pictures.read import EXTENSIONS, walk
from animals.pictures.split import manifest as split_manifest
from config import Config

DATA_PAGE = "https://aistudio.baidu.com/datasetdetail/140388/0"


def prepare(config: Config, splits=SPLITS, model_name_or_path="model") -> dict[str, dict]:
    """Build the caches of `splits` that are missing or stale; a summary per split.

    Summary: n, classes {label: n}, excluded {reason: n}, ignored {kind of file: n}, image_tokens {min, mean, max},
    fingerprint (of contents and wording, the same on every machine), built (by this call), warnings (lines).
    Raises one UserError with a line for each problem of all the splits. Several processes may call it at once: one
    builds, the others wait. Imports no torch.
    """
    geometry = read_geometry(model_name_or_path, config.image_view)
    problems = folder_problems(config, splits)
    if problems:
        raise UserError("\n".join(problems))
    from animals.pictures.leaks import leak_problem, leak_table, read_leaks, search_leaks, stopping

    metas = {split: fresh_meta(config, split) for split in SPLITS}
    summaries = {split: fresh_summary(config, split, geometry, metas[split]) for split in splits}
    leaks = read_leaks(config, metas) if all(summaries.values()) else None
    if leaks is None:
        with lock(config):
            summaries, metas = checked(config, splits, geometry)
            if not any(split_problems(config, split, summaries[split]) for split in splits):
                leaks = read_leaks(config, metas) or search_leaks(config, metas)
    problems = [line for split in splits for line in split_problems(config, split, summaries[split])]
    for split, summary in summaries.items():
        if summary["built"]:
            print("\n".join(notes(config, split, summary)), file=sys.stderr, flush=True)
    if problems:
        raise UserError("\n".join(problems))
    if (found := stopping(leaks, splits)) and not config.allow_leaks:
        raise UserError(leak_problem(config, found))
    if any(summary["built"] for summary in summaries.values()) and (table := leak_table(config, leaks)):
        print(table, file=sys.stderr, flush=True)
    for summary in summaries.values():
        summary["leaks"] = leaks
    return summaries


def checked(config: Config, splits, geometry: Geometry) -> tuple[dict[str, dict], dict[str, dict]]:
    """The summaries of `splits`, built where they are stale, and the fresh metas of all splits. Under lock()."""
    metas, summaries = {split: fresh_meta(config, split) for split in SPLITS}, {}
    for split in splits:
        summary = fresh_summary(config, split, geometry, metas[split])
        if summary is None:
            metas[split] = build(config, split, geometry)
            summary = {**metas[split]["summary"], "built": True}
        summaries[split] = summary
    return summaries, metas


def cut_command(config: Config, arguments: str) -> str:
    where = "" if config.input_dir == Config().input_dir else f" --input_dir {config.input_dir}"
    return f"python data_process_utils.py{where} {arguments}"


def folder_problems(config: Config, splits) -> list[str]:
    """What is wrong with the folders themselves: one line a problem, before any picture is read."""
    problems = []
    table = ", ".join(config.folder_to_label)
    ways = {  # manifest: what was interrupted, how to finish it, how to take it back
        split_manifest(config.input_dir): ("cut", "--validation_fraction 0.2 --seed 42", "--undo_split"),
        quarantine_manifest(config.input_dir): ("quarantine", "--quarantine LIST.csv", "--undo_quarantine"),
    }
    for half, (what, again, back) in ways.items():
        if moves.unfinished(half):
            problems.append(
                f"{half}: found a {what} that was interrupted; finish it: {cut_command(config, again)}; or take it "
                f"back: {cut_command(config, back)}"
            )
    for split in splits:
        root = split_folder(config, split)
        if not os.path.isdir(root):
            try:
                there = sorted(name for name in os.listdir(config.input_dir) if not name.startswith("."))
                found = f"{config.input_dir} holds {', '.join(there[:8]) or 'nothing'}{', ...' if there[8:] else ''}"
            except OSError:
                found = f"{config.input_dir} does not exist either"
            expected = f"one folder of pictures a class: {table}"
            if split == "train":
                do = (
                    f"put the training pictures there (the ten animals of the README: {DATA_PAGE}), "
                    "or name another folder with --input_dir"
                )
            else:
                expected = "the same class folders as in train_data, with pictures that training does not see"
                do = f"cut it off the training pictures: {cut_command(config, '--validation_fraction 0.2 --seed 42')}"
            problems.append(f"{root}: not found ({found}); expected {expected}; {do}")
            continue
        try:
            folders = subfolders(root)
        except OSError as error:
            problems.append(cannot_list(error, root))
            continue
        for folder in folders:
            if folder not in config.folder_to_label:
                problems.append(
                    f"{os.path.join(root, folder)}: a class folder that is not in the label table; expected one of "
                    f"{table}; rename it, move it away, or add it to FOLDER_TO_LABEL in config.py"
                )
        known = [folder for folder in folders if folder in config.folder_to_label]
        for folder in known:
            strays = Counter()
            try:
                if next(walk(os.path.join(root, folder), strays), None) is None:
                    problems.append(
                        f"{os.path.join(root, folder)}: found no picture ({counted(strays) or 'empty'}); expected at "
                        f"least one file {', '.join(EXTENSIONS)}; add pictures or remove the folder"
                    )
            except OSError as error:
                problems.append(cannot_list(error, root))
        if len(known) < 2:
            found = ", ".join(known) or "none"
            problems.append(
                f"{root}: found {len(known)} class folders ({found}); expected at least two of {table}; "
                "put the pictures there, one folder a class"
            )
    return problems


def split_problems(config: Config, split: str, summary: dict) -> list[str]:
    """What the check found that training must not start with."""
    problems = []
    root, excluded = split_folder(config, split), Path(config.temp_dir) / "excluded.csv"
    lost = sum(summary["excluded"].values())
    for folder, n in summary["folders"].items():
        if n == 0:
            problems.append(
                f"{os.path.join(root, folder)}: found no usable picture; expected at least one; add pictures or "
                f"remove the folder ({excluded} lists what was excluded)"
            )
    if lost > config.max_excluded * (summary["n"] + lost):
        problems.append(
            f"{root}: found {lost:,} of {summary['n'] + lost:,} pictures unusable ({counted(summary['excluded'])}); "
            f"expected at most {config.max_excluded:.1%}; mend or remove those in {excluded}, or raise --max_excluded"
        )
    return problems


def counted(counts: dict) -> str:
    return ", ".join(f"{key} {n:,}" for key, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def notes(config: Config, split: str, summary: dict) -> list[str]:
    """What was done and left out, a line each."""
    found = summary["n"] + sum(summary["excluded"].values())
    lines = [f"{split}: {found:,} pictures checked in {summary['seconds']} s, {summary['decoded']:,} of them decoded"]
    if summary["excluded"]:
        lines.append(
            f"{split}: excluded {counted(summary['excluded'])}; listed in {Path(config.temp_dir) / 'excluded.csv'}"
        )
    if summary["ignored"]:
        lines.append(f"{split}: ignored files that are not pictures: {counted(summary['ignored'])}")
    return lines + [f"warning: {line}" for line in summary["warnings"]]
