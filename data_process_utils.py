"""Class folders -> checked pictures -> chat-format JSON, cached in temp/ and loaded memory-mapped.

    python data_process_utils.py                                        # check the pictures, build both caches
    python data_process_utils.py --validation_fraction 0.2 --seed 42    # cut a validation split off train_data
    python data_process_utils.py --undo_split                           # put the pictures of the newest cut back
    python data_process_utils.py --quarantine temp/leaks.csv            # move the listed pictures out of both splits
    python data_process_utils.py --undo_quarantine                      # put those of the newest quarantine back
    python data_process_utils.py --audit                                # which labels are likely wrong? Needs model/

train.py and validation.py check the pictures themselves before they start; this script is for looking first.

Reads   <input_dir>/{train_data,validation_data}/<class folder>/**, classes as in config.FOLDER_TO_LABEL.
Leaves  <temp_dir>/{train,validation}.json: conversations as TRL and datasets read them, one picture a line
        <temp_dir>/{train,validation}.checked.parquet and .meta.json: what is known of every file, and what the cache
        was built from
        <temp_dir>/excluded.csv (image,split,reason): what training will not see
        <temp_dir>/leaks.csv: equal and similar pictures in both splits, under two labels, within a split
        (animals/pictures/leaks.py)
        <temp_dir>/audit.csv and audit.html, by --audit: suspects (animals/scoring/audit.py)

Every picture is decoded once, as training decodes it (animals/pictures/read.py); later starts cost one stat a file.
Added, removed or replaced pictures are decoded, the others not again; a changed prompt, label table or checkpoint
geometry rewrites the JSON and decodes nothing. No picture is ever changed or deleted; only the cut and the quarantine
move any.
"""

import os
from collections import Counter

import config as settings
from animals.checkpoint.task import settings_for
from animals.checkpoint.tokens import Geometry, read_geometry, whole_view_gain
from animals.command import UserError, run
from animals.pictures import moves, quarantine
from animals.pictures import split as data_split
from animals.pictures.cache import load_split, lock, split_folder
from animals.pictures.prepare import checked, cut_command, folder_problems, notes, prepare, split_problems
from animals.pictures.read import list_pictures
from config import Config


def table(summaries: dict[str, dict]) -> str:
    """What a person wants to see before training: classes by splits, then what was left out."""
    labels = list(next(iter(summaries.values()))["classes"])
    width = max(map(len, [*labels, "image tokens"]))
    found, tokens = list(summaries.values()), "{min:,} | {mean:,.0f} | {max:,}".format
    rows = [("", summaries), *((label, [f"{s['classes'][label]:,}" for s in found]) for label in labels)]
    rows.append(("pictures", [f"{s['n']:,}" for s in found]))
    rows.append(("excluded", [f"{sum(s['excluded'].values()):,}" for s in found]))
    rows.append(("image tokens", [tokens(**s["image_tokens"]) for s in found]))
    lines = [f"{name:{width}}" + "".join(f"{cell:>22}" for cell in cells) for name, cells in rows]
    return "\n".join(lines) + "   (min | mean | max)"


def cut(config: Config, fraction: float, seed: int, add: bool, geometry: Geometry) -> None:
    """Move a share of each class of train_data to validation_data (pictures/split.py), and say what was moved."""
    data_split.check_fraction(fraction)
    manifest = data_split.manifest(config.input_dir)
    with lock(config):
        if moves.unfinished(manifest):
            print(f"finished the interrupted cut: {moves.finish(manifest)['said']}")
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
        summaries, _ = checked(config, splits, geometry)
        if problems := split_problems(config, "train", summaries["train"]):
            raise UserError("\n".join(problems))
        from animals.pictures.leaks import find_leaks, load_pictures

        pictures = load_pictures(config, splits)
        group = find_leaks(pictures, config.near_duplicate_distance, config.look_alike_limit)[1]
        rows = []
        for image, in_validation, pixels, number in zip(
            pictures.image, pictures.split, pictures.pixels, group, strict=True
        ):
            name = os.path.relpath(image, split_folder(config, "validation" if in_validation else "train"))
            rows.append((name, name.split("/")[0], bytes.fromhex(pixels), number, bool(in_validation)))
        chosen = data_split.choose(rows, fraction, seed)
        before = summaries["train"]["folders"]
        moved = Counter(path.split("/")[0] for path in chosen)
        said = f"{len(chosen):,} of {sum(before.values()):,} pictures moved to {held_out}"
        data_split.cut(config.input_dir, chosen, {"fraction": fraction, "seed": seed, "said": said})
    for folder, n in before.items():
        print(f"{folder:12} {moved[folder]:>8,} of {n:>8,} = {moved[folder] / n:.1%}")
    print(f"{said}, each group of look-alikes on one side ({len(set(group.tolist())):,} groups)")
    if len(rows) > config.look_alike_limit:
        print(f"warning: more than {config.look_alike_limit:,} pictures, so only equal ones were kept together")
    print(f"next: {cut_command(config, '').strip()}; to take it back: {cut_command(config, '--undo_split')}")


def undo_split(config: Config) -> None:
    """Put the pictures of the newest cut back into train_data."""
    steps = moves.read(data_split.manifest(config.input_dir))["steps"]
    away = {
        source for step in moves.read(quarantine.manifest(config.input_dir))["steps"] for source, _ in step["moves"]
    }
    if steps and (gone := [target for _, target in steps[-1]["moves"] if target in away]):
        raise UserError(
            f"--undo_split: found {len(gone):,} pictures of the cut in quarantine, e.g. {gone[0]}; expected them in "
            f"validation_data; put them back first: {cut_command(config, '--undo_quarantine')}"
        )
    put_back(config, data_split.manifest(config.input_dir), f"in {split_folder(config, 'train')}", "--undo_split")


def put_back(config: Config, manifest: str, where: str, flag: str) -> None:
    """Undo the newest step of a manifest, and say so."""
    with lock(config):
        n, lost = moves.undo(manifest)
        left = len(moves.read(manifest)["steps"])
    print(f"{n:,} pictures are back {where}")
    for path in lost:
        print(f"warning: {path}: no longer there, not put back")
    if left:
        print(f"{left:,} earlier ones remain; take the newest of them back: {cut_command(config, flag)}")


def put_in_quarantine(config: Config, path: str, force: bool) -> None:
    with lock(config):
        if moves.unfinished(quarantine.manifest(config.input_dir)):
            step = moves.finish(quarantine.manifest(config.input_dir))
            print(f"finished the interrupted quarantine of {step['list']}: {len(step['moves']):,} pictures moved")
            return
        counts = quarantine.quarantine(config, path, force)
    for folder, n in sorted(counts.items()):
        print(f"{folder:30} {n:>8,}")
    print(
        f"{sum(counts.values()):,} pictures moved to {os.path.join(config.input_dir, 'quarantine')}; to take it back: "
        f"{cut_command(config, '--undo_quarantine')}"
    )


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
    group.add_argument("--undo_split", action="store_true", help="move the pictures of the newest cut back")
    group = parser.add_argument_group("the quarantine")
    group.add_argument(
        "--quarantine", metavar="LIST.csv", help="move the pictures in its column image out of the splits"
    )
    group.add_argument("--undo_quarantine", action="store_true", help="move those of the newest quarantine back")
    group.add_argument("--force", action="store_true", help="more than 10 %% of a class may go")
    args = parser.parse_args()
    config = settings_for(settings.take(args), args.model_name_or_path, training=True)
    if args.audit:
        find_suspects(config, args.model_name_or_path)
    elif args.undo_split:
        undo_split(config)
    elif args.undo_quarantine:
        put_back(config, quarantine.manifest(config.input_dir), "from the quarantine", "--undo_quarantine")
    elif args.quarantine:
        put_in_quarantine(config, args.quarantine, args.force)
    elif args.validation_fraction is not None:
        geometry = read_geometry(args.model_name_or_path, config.image_view)
        cut(config, args.validation_fraction, args.seed, args.add_to_validation, geometry)
    else:
        look(config, args.model_name_or_path)


def look(config: Config, model_name_or_path: str) -> None:
    """Check the pictures, and print what a person wants to see before training."""
    from animals.pictures.leaks import leak_table

    summaries = prepare(config, model_name_or_path=model_name_or_path)
    print(table(summaries))
    data = load_split(config, "train")
    print(whole_view_gain(zip(data["width"], data["height"], strict=True), read_geometry(model_name_or_path)))
    if not any(summary["built"] for summary in summaries.values()):  # else prepare() has said it
        lines = [line for split in summaries for line in notes(config, split, summaries[split])[1:]]
        print("\n".join([*lines, leak_table(config, summaries["train"]["leaks"])]))


if __name__ == "__main__":
    run(main)
