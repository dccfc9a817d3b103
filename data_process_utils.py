"""Class folders -> checked pictures -> chat-format JSON, cached in temp/ and loaded memory-mapped.

    python data_process_utils.py                                        # check the pictures, build both caches
    python data_process_utils.py --validation_fraction 0.2 --seed 42    # cut a validation split off train_data
    python data_process_utils.py --undo_split                           # put the pictures of the newest cut back

Leaves  <temp_dir>/{train,validation}.json: conversations as TRL and datasets read them, one picture per line
        <temp_dir>/excluded.csv (image,split,reason): what training will not see
        <temp_dir>/duplicates.csv: equal and similar pictures (animals/pictures/duplicates.py)

Every picture is decoded once, as training decodes it; later starts cost one stat per file. When pictures were added,
removed or replaced, all of that split are decoded again; a changed prompt, label table or geometry rewrites the JSON.
"""

import os
from collections import Counter

import config as settings
from animals.checkpoint.image_tokens import Geometry, image_token_count, read_geometry
from animals.checkpoint.task import settings_for
from animals.command import Findings, UserError, run
from animals.pictures import moves
from animals.pictures.cache import SPLITS, fresh_entries, load_split, lock, read_cache, refresh, split_folder
from animals.pictures.prepare import commands, folder_problems, notes, prepare, split_problems
from animals.pictures.read import list_pictures
from animals.pictures.split import choose, describe_undivided
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


def describe_whole_view(sizes, geometry: Geometry) -> str:
    """One line about pictures of these (width, height): how many the whole view shows in full, and what it saves."""
    side, counts = geometry.image_size, Counter(sizes)
    n, base = counts.total(), image_token_count(1, 1, geometry._replace(pinpoints=()))
    small = sum(count for (width, height), count in counts.items() if width * height <= side**2)
    line = f"{small:,} of {n:,} pictures ({small / n:.0%}) have no more pixels than the whole view, {side} x {side}"
    if not geometry.pinpoints:  # a plain LLaVA checkpoint, which sees nothing else
        return line
    tokens = sum(count * image_token_count(*size, geometry) for size, count in counts.items()) / n
    saving = f"{tokens / base:.1f} times fewer tokens, {base} per picture instead of {tokens:,.0f}"
    return f"{line}; it takes {saving} (made by scripts/whole_view.py)"


def check(config: Config, model_path: str) -> None:
    """Check the pictures, and print what a person wants to see before training."""
    from animals.pictures.duplicates import describe_duplicates, read_duplicates

    summaries = prepare(config, model_path=model_path)
    print(table(summaries))
    data = load_split(config, "train", summaries["train"])
    print(describe_whole_view(zip(data["width"], data["height"], strict=True), read_geometry(model_path)))
    if not any(summary["built"] for summary in summaries.values()):  # otherwise prepare() has just said it
        lines = [line for split in summaries for line in notes(config, split, summaries[split])[1:]]
        found = read_duplicates(config, fresh_entries(config, read_cache(config)))
        print("\n".join([*lines, *describe_duplicates(config, found)]))


def cut(config: Config, fraction: float, seed: int, add: bool, model_path: str) -> None:
    """Move a share of each class of train_data to validation_data, and say what was moved."""
    with lock(config, moving=True):
        moves.require_finished(config.input_dir)
        held_out, splits = split_folder(config, "validation"), ["train"]
        if os.path.isdir(held_out) and list_pictures(held_out):
            if not add:
                ways = "add more: --add_to_validation, or undo: --undo_split"
                raise UserError(f"{held_out}: found pictures; expected none; {ways}")
            splits.append("validation")
        Findings(folder_problems(config, ["train"])).report()
        summary = refresh(config, splits, read_geometry(model_path))["train"]["summary"]
        Findings(split_problems(config, "train", summary)).report()
        rows = list(rows_to_choose_from(config, splits))
        chosen = choose(rows, fraction, seed)
        if undivided := describe_undivided(rows, chosen):
            found = f"{split_folder(config, 'train')}: found classes that cannot be divided: {undivided}"
            expected = "of each class a picture that is held out and one that stays, near-duplicates on one side"
            ways = "lower --near_duplicate_distance, change --validation_fraction, or remove the class"
            raise UserError(f"{found}; nothing was moved; expected {expected}; add pictures of other scenes, {ways}")
        before, moved = summary["folders"], Counter(path.split("/")[0] for path in chosen)
        said = f"{len(chosen):,} of {sum(before.values()):,} pictures moved to {held_out}"
        pairs = [(f"train_data/{name}", f"validation_data/{name}") for name in chosen]
        moves.start(config.input_dir, "cut", pairs, {"fraction": fraction, "seed": seed, "said": said})
    for folder, n in before.items():
        print(f"{folder:12} {moved[folder]:>8,} of {n:>8,} = {moved[folder] / n:.1%}")
    print(f"{said}, each group of near-duplicates on one side ({len({row[2] for row in rows}):,} groups)")
    if len(rows) > config.near_duplicate_limit:
        print(f"warning: more than {config.near_duplicate_limit:,} pictures, so only equal ones were kept together")
    next_one, _, back = commands(config.input_dir, "cut")
    print(f"next: {next_one}; to take it back: {back}")


def rows_to_choose_from(config: Config, splits):
    """(name, pixel hash, group, is already held out) of each usable picture, as choose() takes them."""
    from animals.pictures.duplicates import find_duplicates, load_pictures

    pictures = load_pictures(config, splits)
    groups = find_duplicates(pictures, config.near_duplicate_distance, config.near_duplicate_limit)[1]
    for image, k, pixels, group in zip(pictures.image, pictures.split, pictures.pixels, groups.tolist(), strict=True):
        name = os.path.relpath(image, split_folder(config, SPLITS[k]))
        yield name, bytes.fromhex(pixels), group, SPLITS[k] == "validation"


def main():
    parser = settings.parser(__doc__.partition("\n")[0], settings.DATA_FIELDS)
    parser.add_argument("--model_name_or_path", default="model", help="checkpoint: how many tokens a picture takes")
    group = parser.add_argument_group("the cut")
    either = group.add_mutually_exclusive_group()
    either.add_argument("--validation_fraction", type=float, help="move this share of each class to validation_data")
    either.add_argument("--undo_split", action="store_true", help="move the pictures of the newest cut back")
    group.add_argument("--seed", type=int, default=42, help="decides which pictures are cut")
    group.add_argument("--add_to_validation", action="store_true", help="cut although validation_data holds pictures")
    args = parser.parse_args()
    config = settings_for(settings.config_from(args), args.model_name_or_path, training=True)
    if args.undo_split:
        with lock(config, moving=True):
            print("\n".join(moves.undo(config.input_dir, "cut")))
    elif args.validation_fraction is not None:
        cut(config, args.validation_fraction, args.seed, args.add_to_validation, args.model_name_or_path)
    else:
        check(config, args.model_name_or_path)


if __name__ == "__main__":
    run(main)
