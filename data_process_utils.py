"""Class folders -> checked pictures -> chat-format JSON, cached in temp/ and loaded memory-mapped.

    python data_process_utils.py                                        # check the pictures, build both caches
    python data_process_utils.py --validation_fraction 0.2 --seed 42    # cut a validation split off train_data
    python data_process_utils.py --undo_split                           # put every picture of the cut back

train.py, validation.py and test.py call prepare() and load_split() themselves; this script is for looking first.

Reads   <input_dir>/{train_data,validation_data}/<class folder>/**, classes as in config.FOLDER_TO_LABEL.
Leaves  <temp_dir>/{train,validation}.json: conversations as TRL and datasets read them, one picture a line
        <temp_dir>/{train,validation}.arrow: the same rows for load_split()
        <temp_dir>/{train,validation}.checked.arrow and .meta.json: what is known of every file, and what the cache
        was built from
        <temp_dir>/excluded.csv (image,split,reason): what training will not see
        <temp_dir>/leaks.csv: pictures in both splits or under two labels (see data_leaks.py)

Every picture is decoded once, by the function that training decodes with (pictures.py); later starts cost one stat a
file. Added, removed or replaced pictures are decoded, the others not again; a changed prompt, label table or
checkpoint geometry rewrites the JSON and decodes nothing. No picture is ever changed, and only the cut moves any.
"""

import os
import sys
from collections import Counter
from pathlib import Path

import config as settings
import data_split
from config import Config, UserError
from data_cache import SPLITS, build, cannot_list, class_folders, lock, read_summary, split_folder, temp_path
from pictures import (
    EXTENSIONS,
    Geometry,
    PictureError,
    Workers,
    image_token_count,
    list_pictures,
    load_picture,
    read_geometry,
    walk,
)

__all__ = [
    "Geometry", "PictureError", "image_token_count", "list_pictures", "load_picture", "load_split", "prepare",
    "read_geometry",
]  # fmt: skip

DATA_PAGE = "https://aistudio.baidu.com/datasetdetail/140388/0"


# --- what the other scripts call --------------------------------------------------------------------------------------


def prepare(config: Config, splits=SPLITS, model_name_or_path="model") -> dict[str, dict]:
    """Build the caches of `splits` that are missing or stale; a summary per split.

    Summary: n, classes {label: n}, excluded {reason: n}, ignored {kind of file: n}, image_tokens {min, mean, max},
    fingerprint (of contents and wording, the same on every machine), built (by this call), warnings (lines).
    Raises one UserError with a line for each problem of all the splits. Several processes may call it at once: one
    builds, the others wait. Imports no torch.
    """
    geometry = read_geometry(model_name_or_path)
    problems = folder_problems(config, splits)
    if problems:
        raise UserError("\n".join(problems))
    from data_leaks import leak_problem, leak_table, read_leaks, search_leaks

    summaries = {split: read_summary(config, split, geometry) for split in splits}
    leaks = read_leaks(config, summaries) if all(summaries.values()) else None
    if leaks is None:
        with lock(config), Workers(config.data_processes) as workers:
            for split in splits:
                summaries[split] = read_summary(config, split, geometry) or build(config, split, geometry, workers)
            problems = [line for split in splits for line in split_problems(config, split, summaries[split])]
            if not problems:
                leaks = read_leaks(config, summaries) or search_leaks(config, summaries)
    else:
        problems = [line for split in splits for line in split_problems(config, split, summaries[split])]
    for split, summary in summaries.items():
        if summary["built"]:
            print("\n".join(notes(config, split, summary)), file=sys.stderr, flush=True)
    if problems:
        raise UserError("\n".join(problems))
    if leaks["counts"]["same"] and not config.allow_leaks:
        raise UserError(leak_problem(config, leaks, splits))
    if leaks["examples"] and any(summary["built"] for summary in summaries.values()):
        print(leak_table(config, leaks, splits), file=sys.stderr, flush=True)
    for summary in summaries.values():
        summary["leaks"] = leaks
    return summaries


def load_split(config: Config, split: str):
    """The cached split as a datasets.Dataset, memory-mapped. Call prepare() first.

    Columns: images [path], messages [{role, content: [{type, text}]}], label, width, height, image_tokens, sha256.
    """
    path = temp_path(config, split, "arrow")
    if not path.is_file():
        raise UserError(f"{path}: not found; expected the cache of {split}; run python data_process_utils.py")
    os.environ.setdefault("HF_DATASETS_CACHE", os.path.abspath(os.path.join(config.temp_dir, "datasets")))
    from datasets import Dataset

    return Dataset.from_file(str(path))


# --- problems ---------------------------------------------------------------------------------------------------------


def cut_command(config: Config, arguments: str) -> str:
    where = "" if config.input_dir == Config().input_dir else f" --input_dir {config.input_dir}"
    return f"python data_process_utils.py{where} {arguments}"


def folder_problems(config: Config, splits) -> list[str]:
    """What is wrong with the folders themselves: one line a problem, before any picture is read."""
    problems = []
    table = ", ".join(config.folder_to_label)
    if half := data_split.unfinished(config.input_dir):
        problems.append(
            f"{half}: found a cut that was interrupted; finish it: "
            f"{cut_command(config, '--validation_fraction 0.2 --seed 42')}; or take it back: "
            f"{cut_command(config, '--undo_split')}"
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
            folders = class_folders(config, split)
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


# --- the command ------------------------------------------------------------------------------------------------------


def table(summaries: dict[str, dict]) -> str:
    """What a person wants to see before training: classes by splits, then what was left out."""
    labels = list(next(iter(summaries.values()))["classes"])
    width = max(map(len, [*labels, "image tokens"]))
    lines = [f"{'':{width}}" + "".join(f"{split:>22}" for split in summaries)]
    for label in labels:
        lines.append(f"{label:{width}}" + "".join(f"{s['classes'][label]:>22,}" for s in summaries.values()))
    lines.append(f"{'pictures':{width}}" + "".join(f"{s['n']:>22,}" for s in summaries.values()))
    lines.append(f"{'excluded':{width}}" + "".join(f"{sum(s['excluded'].values()):>22,}" for s in summaries.values()))
    cell = "{min:,} | {mean:,.0f} | {max:,}"
    lines.append(
        f"{'image tokens':{width}}"
        + "".join(f"{cell.format(**s['image_tokens']):>22}" for s in summaries.values())
        + "   (min | mean | max)"
    )
    return "\n".join(lines)


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


def cut(config: Config, fraction: float, seed: int, add: bool, geometry: Geometry) -> None:
    """Move a share of each class of train_data to validation_data (data_split.py), and say what was moved."""
    data_split.check_fraction(fraction)
    with lock(config):
        half = data_split.unfinished(config.input_dir)
        if half == data_split.manifest(config.input_dir, "undoing"):
            put_back, _ = data_split.undo(config.input_dir)
            print(f"finished an interrupted undo: {put_back:,} pictures are back in train_data")
        elif half:
            plan = data_split.finish_cut(config.input_dir)
            print(f"finished the interrupted cut: {plan['moves_said']}")
            return
        splits = ["train"]
        held_out = split_folder(config, "validation")
        if os.path.isdir(held_out) and list_pictures(held_out):
            if not add:
                raise UserError(
                    f"{held_out}: found pictures there already; expected none; cut more with --add_to_validation, or "
                    "take the last cut back with --undo_split"
                )
            splits.append("validation")
        if problems := folder_problems(config, ["train"]):
            raise UserError("\n".join(problems))
        with Workers(config.data_processes) as workers:
            summaries = {s: read_summary(config, s, geometry) or build(config, s, geometry, workers) for s in splits}
        if problems := split_problems(config, "train", summaries["train"]):
            raise UserError("\n".join(problems))
        from data_leaks import groups, load_pictures

        pictures, name = load_pictures(config, splits)
        group, capped = groups(pictures, config.near_duplicate_distance)
        rows = []
        for row in range(len(group)):
            split, path = name(row)
            rows.append((path, path.split("/")[0], pictures.pixels[row].tobytes(), group[row], split != "train"))
        chosen = data_split.choose(rows, fraction, seed)
        before = summaries["train"]["folders"]
        moved = Counter(path.split("/")[0] for path in chosen)
        said = f"{len(chosen):,} of {sum(before.values()):,} pictures moved to {held_out}"
        data_split.cut(config.input_dir, chosen, {"fraction": fraction, "seed": seed, "moves_said": said})
    for folder, n in before.items():
        print(f"{folder:12} {moved[folder]:>8,} of {n:>8,} = {moved[folder] / n:.1%}")
    print(f"{said}, each group of look-alikes on one side ({len(set(group.tolist())):,} groups)")
    if capped:
        print(f"warning: {capped:,} pictures look like more than 1,024 others; not all of those were compared")
    print(f"next: {cut_command(config, '').strip()}; to take it back: {cut_command(config, '--undo_split')}")


def undo(config: Config) -> None:
    with lock(config):
        put_back, lost = data_split.undo(config.input_dir)
    print(f"{put_back:,} pictures are back in {split_folder(config, 'train')}")
    for path in lost:
        print(f"warning: {path}: no longer there, not put back")


def main():
    parser = settings.parser(__doc__.partition("\n")[0])
    parser.add_argument("--model_name_or_path", default="model", help="checkpoint folder, for the image-token counts")
    group = parser.add_argument_group("the cut")
    group.add_argument("--validation_fraction", type=float, help="move this share of each class to validation_data")
    group.add_argument("--seed", type=int, default=42, help="which pictures are cut")
    group.add_argument("--add_to_validation", action="store_true", help="cut although validation_data holds pictures")
    group.add_argument("--undo_split", action="store_true", help="move the pictures of the cut back")
    args = parser.parse_args()
    config = settings.take(args)
    if args.undo_split:
        undo(config)
    elif args.validation_fraction is not None:
        cut(config, args.validation_fraction, args.seed, args.add_to_validation, read_geometry(args.model_name_or_path))
    else:
        from data_leaks import leak_table

        summaries = prepare(config, model_name_or_path=args.model_name_or_path)
        print(table(summaries))
        if not any(summary["built"] for summary in summaries.values()):  # else prepare() has said it
            lines = [line for split in summaries for line in notes(config, split, summaries[split])[1:]]
            print("\n".join([*lines, leak_table(config, summaries["train"]["leaks"], SPLITS)]))


if __name__ == "__main__":
    settings.run(main)
