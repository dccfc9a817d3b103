"""Write the whole view of LLaVA-NeXT as a plain LLaVA checkpoint, once.

    python scripts/whole_view.py model model-whole

LLaVA-NeXT sees each picture in tiles and in its whole view: the picture squeezed into one tile, which takes 576 tokens
whatever its shape. The whole view alone is LLaVA's own architecture, with the same weights but without `image_newline`.
Only the weight file that holds `image_newline` is written again; the others are hard links where the disk allows it.
"""

import os
import shlex
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from animals.checkpoint.check import adapter_config, check_weights, require_checkpoint
from animals.checkpoint.family import PROCESSORS, read_settings
from animals.checkpoint.load import load_processor
from animals.checkpoint.save import add_other_files
from animals.checkpoint.task import read_task
from animals.command import Parser, UserError, run
from animals.files import read_json, write_json


def write_whole_view(source: Path, out: Path):
    """Write the plain LLaVA checkpoint to the folder `out`; config.json last, by which readers know a checkpoint."""
    require_checkpoint(source)
    if adapter_config(source) is not None:
        raise UserError(f"{source}: found an adapter; expected a checkpoint; merge it first: scripts/merge_lora.py")
    config = read_settings(source, "config.json")
    if config["model_type"] == "llava":
        raise UserError(
            f"{source}: found a plain LLaVA, which sees the whole view already; expected LLaVA-NeXT; use it as it is"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: found files there; expected a new or empty folder; delete it, or name another one")
    if problems := check_weights(source):
        raise UserError("\n".join(problems))
    out.mkdir(parents=True, exist_ok=True)
    write_weights(source, out)
    add_other_files(out, source, load_processor(source), read_task(source))
    processor, kind = read_settings(out, "processor_config.json"), {"processor_class": PROCESSORS["llava"]}
    pixels = processor.pop("image_processor", None) or read_settings(out, "preprocessor_config.json")
    write_json(out / "preprocessor_config.json", whole_view_pixels(pixels) | kind)
    write_json(out / "processor_config.json", processor | kind)
    write_json(out / "tokenizer_config.json", read_json(out / "tokenizer_config.json") | kind)
    write_json(out / "config.json", whole_view_config(config))


def write_weights(source: Path, out: Path):
    """Write the weight files, and their index if there is one, without image_newline."""
    from safetensors.torch import load_file, save_file

    index_file = source / "model.safetensors.index.json"
    index = read_json(index_file) if index_file.is_file() else {"weight_map": {"image_newline": "model.safetensors"}}
    changed = index["weight_map"].pop("image_newline")
    for name in set(index["weight_map"].values()) - {changed}:
        try:
            os.link(os.path.realpath(source / name), out / name)  # a file in the hub's cache is a symbolic link
        except OSError:  # another disk, or one without hard links
            shutil.copyfile(source / name, out / name)
    weights = load_file(source / changed)
    newline = weights.pop("image_newline")
    save_file(weights, out / changed, metadata={"format": "pt"})
    if index_file.is_file():
        sizes = {"total_size": newline.nbytes, "total_parameters": newline.numel()}
        old = index.get("metadata") or {}
        index["metadata"] = old | {key: old[key] - sizes[key] for key in sizes.keys() & old.keys()}
        write_json(out / index_file.name, index)


def whole_view_config(config: dict) -> dict:
    """config.json of LLaVA-NeXT -> the one of its whole view."""
    vision, tiles = config["vision_config"], ("image_grid_pinpoints", "use_image_newline_parameter")
    tokens = (vision.get("image_size", 336) // vision.get("patch_size", 14)) ** 2  # 576 by default, whatever the tower
    kind = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "image_seq_length": tokens}
    return {key: value for key, value in config.items() if key not in tiles} | kind


def whole_view_pixels(pixels: dict) -> dict:
    """preprocessor_config.json of LLaVA-NeXT -> CLIP's that makes the same whole view: squeezed, not cropped."""
    size = pixels.get("size") or 224  # CLIP's default
    side = size if isinstance(size, int) else size.get("shortest_edge") or size["height"]
    square = {"height": side, "width": side}
    kept = ("do_convert_rgb", "do_normalize", "do_rescale", "image_mean", "image_std", "resample", "rescale_factor")
    return {key: pixels[key] for key in kept if key in pixels} | {
        "crop_size": square,  # transformers counts tokens by it, even without a crop; 224 by default
        "do_center_crop": False,
        "do_resize": True,
        "image_processor_type": "CLIPImageProcessor",
        "size": square,
    }


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder of a LLaVA-NeXT checkpoint, of the hub's or a trained one")
    parser.add_argument("out", type=Path, help="new or empty folder for the plain LLaVA checkpoint")
    args = parser.parse_args()
    write_whole_view(args.source, args.out)
    print(f"wrote {args.out}. Next:\n    sh train.sh --model_name_or_path {shlex.quote(str(args.out))}")


if __name__ == "__main__":
    run(main)
