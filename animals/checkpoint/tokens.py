"""How many tokens a picture costs, from a checkpoint's files alone: no picture is opened, no torch imported."""

import math
import os
from collections import Counter
from typing import NamedTuple

from animals.files import read_json


class Geometry(NamedTuple):
    """What decides how many tokens a picture costs. The defaults are LLaVA-1.6-Mistral-7B's."""

    image_size: int = 336  # side of a tile, pixels
    patch_size: int = 14
    # (height, width); none for the whole view alone
    pinpoints: tuple = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
    extra_tokens: int = 1  # CLS ...
    strategy: str = "default"  # ... which "default" drops


STOCK = Geometry()


def read_geometry(model_name_or_path, view="tiles") -> Geometry:
    """The geometry of a checkpoint folder, from the files that its processor reads, else the model's config.json.

    Size and pinpoints: processor_config.json's image_processor, else preprocessor_config.json, as transformers does.
    Patch size, extra tokens and strategy: processor_config.json. Stock LLaVA-1.6 values for what no file says, or
    when the folder does not exist yet.
    """

    def read(name):
        file = os.path.join(model_name_or_path, name)
        content = read_json(file) if os.path.isfile(file) else {}
        return content if isinstance(content, dict) else {}

    model, processor = read("config.json"), read("processor_config.json")
    images = processor.get("image_processor") or read("preprocessor_config.json")
    vision = model.get("vision_config") or {}
    size = images.get("size") or {}
    size = {"shortest_edge": size} if isinstance(size, int) else size
    side = size.get("shortest_edge") or min(size.get("height", 0), size.get("width", 0))
    pinpoints = images.get("image_grid_pinpoints") or model.get("image_grid_pinpoints") or STOCK.pinpoints
    if view == "whole" or model.get("model_type") == "llava":
        pinpoints = ()
    return Geometry(
        image_size=side or vision.get("image_size") or STOCK.image_size,
        patch_size=processor.get("patch_size") or vision.get("patch_size") or STOCK.patch_size,
        pinpoints=tuple(tuple(pair) for pair in pinpoints),
        extra_tokens=processor.get("num_additional_image_tokens", STOCK.extra_tokens),
        strategy=processor.get("vision_feature_select_strategy")
        or model.get("vision_feature_select_strategy", STOCK.strategy),
    )


def image_token_count(width: int, height: int, geometry: Geometry = STOCK) -> int:
    """Tokens of one picture in the prompt; equals transformers' LlavaNextProcessor._get_num_multimodal_tokens."""
    side = geometry.image_size // geometry.patch_size  # patches a tile side
    base = side * side + geometry.extra_tokens - (geometry.strategy == "default")
    if not geometry.pinpoints:
        return base
    best, most, least_waste = None, 0, math.inf
    for pin_height, pin_width in geometry.pinpoints:
        scale = min(pin_width / width, pin_height / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        waste = pin_height * pin_width - used
        if used > most or (used == most and waste < least_waste):
            best, most, least_waste = (pin_height, pin_width), used, waste
    rows, columns = side * (best[0] // geometry.image_size), side * (best[1] // geometry.image_size)
    if width / height > columns / rows:
        padding = (rows - int(round(height * (columns / width), 7))) // 2
        rows -= 2 * padding
    else:
        padding = (columns - int(round(width * (rows / height), 7))) // 2
        columns -= 2 * padding
    return base + rows * columns + rows  # the whole picture, its tiles, one newline a row


def whole_view_gain(sizes, geometry: Geometry) -> str:
    """A line about pictures of these (width, height): does the whole view hold them, and what does it save?

    geometry: of tiles; of a checkpoint that sees whole already, the line is only about what is held.
    """
    side, whole = geometry.image_size, image_token_count(1, 1, geometry._replace(pinpoints=()))
    counts = Counter(sizes)
    n = counts.total()
    held = sum(count for (width, height), count in counts.items() if width * height <= side**2)
    tokens = sum(count * image_token_count(*size, geometry) for size, count in counts.items())
    said = f"{held:,} of {n:,} pictures ({held / n:.0%}) have no more pixels than the whole view, {side} x {side}"
    if not geometry.pinpoints:
        return said
    return (
        f"{said}; --image_view whole takes {tokens / n / whole:.1f} times fewer tokens: {whole} a picture instead of "
        f"{tokens / n:,.0f}"
    )
