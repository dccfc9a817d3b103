"""How many tokens a picture takes in the prompt, from a checkpoint's files alone: no picture is opened, no torch."""

from typing import NamedTuple

from animals.checkpoint.check import base_of
from animals.checkpoint.family import read_settings


class Geometry(NamedTuple):
    """What decides how many tokens a picture takes. The defaults are LLaVA-1.6-Mistral-7B's."""

    image_size: int = 336  # side of a tile, pixels
    patch_size: int = 14
    pinpoints: tuple = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))  # height, width; none: whole view
    extra_tokens: int = 1  # CLIP's class token ...
    strategy: str = "default"  # ... which "default" drops


STOCK = Geometry()


def read_geometry(path) -> Geometry:
    """A checkpoint's geometry, from its files in the order in which transformers reads them; else STOCK."""
    folder = base_of(path)  # an adapter's own folder has no config.json, which names the view
    names = ("config.json", "processor_config.json", "preprocessor_config.json")
    model, processor, pixels = (read_settings(folder, name) or {} for name in names)
    images = processor.get("image_processor") or pixels
    vision, size = model.get("vision_config") or {}, images.get("size") or {}
    size = {"shortest_edge": size} if isinstance(size, int) else size
    side = size.get("shortest_edge") or min(size.get("height", 0), size.get("width", 0))
    pinpoints = images.get("image_grid_pinpoints") or model.get("image_grid_pinpoints") or STOCK.pinpoints
    strategy = processor.get("vision_feature_select_strategy") or model.get("vision_feature_select_strategy")
    return Geometry(
        image_size=side or vision.get("image_size") or STOCK.image_size,
        patch_size=processor.get("patch_size") or vision.get("patch_size") or STOCK.patch_size,
        pinpoints=() if model.get("model_type") == "llava" else tuple(tuple(pair) for pair in pinpoints),
        extra_tokens=processor.get("num_additional_image_tokens", STOCK.extra_tokens),
        strategy=strategy or STOCK.strategy,
    )


def image_token_count(width: int, height: int, geometry: Geometry = STOCK) -> int:
    """Tokens of one picture in the prompt, as LlavaNextProcessor and LlavaProcessor of transformers count them."""
    side = geometry.image_size // geometry.patch_size  # patches along the side of a tile
    base = side * side + geometry.extra_tokens - (geometry.strategy == "default")
    if not geometry.pinpoints:
        return base

    def pixels_and_waste(pinpoint):
        """How many of the picture's pixels a pinpoint keeps; of two that keep as many, the smaller one is better."""
        scale = min(pinpoint[1] / width, pinpoint[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - pinpoint[0] * pinpoint[1]

    rows, columns = (side * (pixels // geometry.image_size) for pixels in max(geometry.pinpoints, key=pixels_and_waste))
    if width / height > columns / rows:  # the tiles' empty rows or columns are cut off
        rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
    else:
        columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
    return base + rows * columns + rows  # the whole view, the tiles, image_newline after each row
