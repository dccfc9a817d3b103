"""The whole view (--image_view whole): each picture once, squeezed into one tile, as a plain `llava` model.

LLaVA-NeXT sees every picture whole and in tiles beside it. Its first view alone is LLaVA's own architecture with the
same weights, less `image_newline`: 336x336 pixels, 576 tokens, whatever the picture's shape. Read from LLaVA-NeXT's
files; saved as a llava checkpoint with processor files of its own, which plain transformers loads. Imports no torch.
"""

import os

from animals.files import read_json, write_json


def is_whole(path) -> bool:
    """Whether a folder holds a plain llava checkpoint, which has no other view."""
    file = os.path.join(path, "config.json")
    return os.path.isfile(file) and read_json(file).get("model_type") == "llava"


def whole_config(config: dict) -> dict:
    """config.json of LLaVA-NeXT -> the whole view's; a llava's as it is."""
    if config["model_type"] == "llava":
        return config
    tiles = ("image_grid_pinpoints", "use_image_newline_parameter")
    left = {key: value for key, value in config.items() if key not in tiles}
    vision = config["vision_config"]
    # 576 by default, whatever the tower; transformers 4.46 goes by it
    tokens = (vision.get("image_size", 336) // vision.get("patch_size", 14)) ** 2
    mine = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "image_seq_length": tokens}
    return left | mine


def whole_pixels(pixels: dict) -> dict:
    """preprocessor_config.json of LLaVA-NeXT -> CLIP's that makes its base view: squeezed, not cropped."""
    size = pixels["size"]
    side = size if isinstance(size, int) else size.get("shortest_edge") or size["height"]
    kept = ("do_convert_rgb", "do_normalize", "do_rescale", "image_mean", "image_std", "resample", "rescale_factor")
    square = {"height": side, "width": side}
    return {
        **{key: pixels[key] for key in kept if key in pixels},
        "crop_size": square,  # unused without a crop, but transformers counts tokens by it; 224 by default
        "do_center_crop": False,
        "do_resize": True,
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "size": square,
    }


def whole_processor(processor):
    """LlavaProcessor of the whole view from LLaVA-NeXT's processor."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    names = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens", "chat_template")
    pixels = whole_pixels(processor.image_processor.to_dict())
    del pixels["image_processor_type"], pixels["processor_class"]
    settings = {name: getattr(processor, name) for name in names}
    return LlavaProcessor(CLIPImageProcessorPil(**pixels), processor.tokenizer, **settings)


def write_whole_files(folder):
    """Make of LLaVA-NeXT's settings files in `folder` the whole view's; of a llava's nothing. Main process only."""

    def change(name, function):
        file = os.path.join(folder, name)
        if os.path.isfile(file):
            write_json(file, function(read_json(file)))

    processor = read_json(os.path.join(folder, "processor_config.json"))
    if "image_processor" in processor:  # as transformers 5 nests it, at which 4.50 stops
        pixels = processor.pop("image_processor")
        write_json(os.path.join(folder, "processor_config.json"), processor)
        write_json(os.path.join(folder, "preprocessor_config.json"), pixels)
    if processor["processor_class"] == "LlavaProcessor":
        return
    change("config.json", whole_config)  # an adapter has none
    change("preprocessor_config.json", whole_pixels)
    for name in ("processor_config.json", "tokenizer_config.json"):
        change(name, lambda settings: settings | {"processor_class": "LlavaProcessor"})


def model_config(path, view="tiles"):
    """transformers' config of a checkpoint folder or of a config.json file, in this view."""
    from transformers import LlavaConfig, LlavaNextConfig

    values = read_json(os.path.join(path, "config.json") if os.path.isdir(path) else path)
    if view == "whole" or values["model_type"] == "llava":
        return LlavaConfig.from_dict(whole_config(values))
    return LlavaNextConfig.from_dict(values)


def model_class(config):
    """The class of model that a config is for."""
    from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

    return LlavaForConditionalGeneration if config.model_type == "llava" else LlavaNextForConditionalGeneration
