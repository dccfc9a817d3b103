"""Class folders -> checked pictures -> chat-format JSON, cached in temp/ and loaded memory-mapped.

    python data_process_utils.py                                        # check the pictures, build both caches
    python data_process_utils.py --validation_fraction 0.2 --seed 42    # cut a validation split off train_data
    python data_process_utils.py --undo_split                           # put every picture of the cut back
    python data_process_utils.py --audit                                # which labels are likely wrong? Needs model/

train.py, validation.py and test.py call prepare() and load_split() themselves; this script is for looking first.

Reads   <input_dir>/{train_data,validation_data}/<class folder>/**, classes as in config.FOLDER_TO_LABEL.
Leaves  <temp_dir>/{train,validation}.json: conversations as TRL and datasets read them, one picture a line
        <temp_dir>/{train,validation}.arrow: the same rows for load_split()
        <temp_dir>/{train,validation}.checked.arrow and .meta.json: what is known of every file, and what the cache
        was built from
        <temp_dir>/excluded.csv (image,split,reason): what training will not see
        <temp_dir>/audit.csv and audit.html, by --audit: suspects (see scoring/audit.py)
        <temp_dir>/leaks.csv: pictures in both splits or under two labels (see pictures/leaks.py)

Every picture is decoded once, as training decodes it (pictures/read.py); later starts cost one stat a
file. Added, removed or replaced pictures are decoded, the others not again; a changed prompt, label table or
checkpoint geometry rewrites the JSON and decodes nothing. No picture is ever changed, and only the cut moves any.
"""

import os
from collections import Counter

import config as settings
from animals.checkpoint.task import settings_for
from animals.checkpoint.tokens import Geometry, read_geometry
from animals.command import UserError, run
from animals.pictures import split as data_split
from animals.pictures.cache import (
    SPLITS,
    build,
    lock,
    read_summary,
    split_folder,
)
from animals.pictures.check import Workers
from animals.pictures.prepare import cut_command, folder_problems, notes, prepare, split_problems
from animals.pictures.read import list_pictures
from config import Config

# --- what the other scripts call --------------------------------------------------------------------------------------


# --- problems ---------------------------------------------------------------------------------------------------------


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


def cut(config: Config, fraction: float, seed: int, add: bool, geometry: Geometry) -> None:
    """Move a share of each class of train_data to validation_data (pictures/split.py), and say what was moved."""
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
        from animals.pictures.leaks import groups, load_pictures

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


def find_suspects(config: Config, model: str) -> None:
    from animals.checkpoint.check import require_checkpoint
    from animals.scoring.audit import REASONS, audit

    require_checkpoint(model)
    config.allow_leaks = True  # found leaks are no reason not to look further
    prepare(config, model_name_or_path=model)
    suspects = Counter(row["reason"] for row in audit(config, model))
    found = ", ".join(f"{reason} {suspects[reason]:,}" for reason in REASONS)
    print(f"suspects: {found}; listed in {config.temp_dir}/audit.csv; look at them in {config.temp_dir}/audit.html")


def main():
    parser = settings.parser(__doc__.partition("\n")[0])
    parser.add_argument("--model_name_or_path", default="model", help="checkpoint: image tokens; --audit")
    parser.add_argument("--audit", action="store_true", help="find suspects by the checkpoint's vision tower")
    group = parser.add_argument_group("the cut")
    group.add_argument("--validation_fraction", type=float, help="move this share of each class to validation_data")
    group.add_argument("--seed", type=int, default=42, help="which pictures are cut")
    group.add_argument("--add_to_validation", action="store_true", help="cut although validation_data holds pictures")
    group.add_argument("--undo_split", action="store_true", help="move the pictures of the cut back")
    args = parser.parse_args()
    config = settings_for(settings.take(args), args.model_name_or_path, training=True)
    if args.audit:
        find_suspects(config, args.model_name_or_path)
    elif args.undo_split:
        undo(config)
    elif args.validation_fraction is not None:
        cut(config, args.validation_fraction, args.seed, args.add_to_validation, read_geometry(args.model_name_or_path))
    else:
        from animals.pictures.leaks import leak_table

        summaries = prepare(config, model_name_or_path=args.model_name_or_path)
        print(table(summaries))
        if not any(summary["built"] for summary in summaries.values()):  # else prepare() has said it
            lines = [line for split in summaries for line in notes(config, split, summaries[split])[1:]]
            print("\n".join([*lines, leak_table(config, summaries["train"]["leaks"], SPLITS)]))


if __name__ == "__main__":
    run(main)
