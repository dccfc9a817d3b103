"""How many tokens a picture takes, from a checkpoint's files alone."""

import json
import random
from pathlib import Path

import pytest

from animals.checkpoint.image_tokens import Geometry, image_token_count, read_geometry
from animals.checkpoint.load import load_processor
from animals.command import UserError

HUB_SIZES = {
    (200, 300): 1464, (225, 300): 1368, (300, 300): 1176, (300, 225): 1032, (336, 336): 1176, (400, 300): 1376,
    (336, 672): 1752, (480, 640): 2340, (672, 672): 2928, (768, 1024): 2340, (1008, 336): 2376, (300, 1200): 1890,
}  # (height, width): tokens of LLaVA-1.6-Mistral-7B  # fmt: skip


def test_image_tokens_of_the_stock_checkpoint():
    for (height, width), tokens in HUB_SIZES.items():
        assert image_token_count(width, height, Geometry()) == tokens
    hub = json.loads((Path(__file__).parent / "helpers" / "hub_config.json").read_text())
    assert [list(pair) for pair in Geometry().pinpoints] == hub["image_grid_pinpoints"]


def test_image_tokens_of_the_hubs_replica(hub):
    processor, sizes = load_processor(hub), list(HUB_SIZES)
    counted = processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens
    ours = [image_token_count(width, height, read_geometry(hub)) for height, width in sizes]
    assert counted == ours == list(HUB_SIZES.values())


SMALL = Geometry(56, 14, ((56, 112), (112, 56), (112, 112)), 1, "default")
FULL = Geometry(48, 8, ((48, 96), (96, 48)), 0, "full")


@pytest.mark.parametrize("geometry", [Geometry(), SMALL, FULL])
def test_image_tokens_equal_the_processors(geometry):
    from transformers import LlavaNextImageProcessorPil, LlavaNextProcessor

    processor = object.__new__(LlavaNextProcessor)  # no tokenizer is needed to count
    processor.image_processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": geometry.image_size}, image_grid_pinpoints=[list(pair) for pair in geometry.pinpoints]
    )
    processor.patch_size, processor.num_additional_image_tokens = geometry.patch_size, geometry.extra_tokens
    processor.vision_feature_select_strategy = geometry.strategy
    rng = random.Random(0)
    sizes = [(rng.randint(1, 2000), rng.randint(1, 2000)) for _ in range(2000)] + [(8000, 10), (10, 8000), (1, 1)]
    for height, width in sizes:
        side = geometry.image_size
        tokens = processor._get_number_of_features(height, width, side, side) - (geometry.strategy == "default")
        assert image_token_count(width, height, geometry) == tokens, (height, width)


def test_geometry_comes_from_the_files_that_the_processor_reads(tmp_path):
    assert read_geometry(tmp_path / "nothing") == Geometry()
    write = lambda name, content: (tmp_path / name).write_text(json.dumps(content))  # noqa: E731
    write("config.json", {"vision_config": {"image_size": 48, "patch_size": 8}, "image_grid_pinpoints": [[48, 96]]})
    assert read_geometry(tmp_path) == Geometry(48, 8, ((48, 96),))
    write("preprocessor_config.json", {"size": {"shortest_edge": 56}, "image_grid_pinpoints": [[56, 112]]})
    assert read_geometry(tmp_path) == Geometry(56, 8, ((56, 112),))
    nested = {"size": {"height": 28, "width": 28}, "image_grid_pinpoints": [[28, 56]]}
    write("processor_config.json", {"image_processor": nested, "patch_size": 14, "num_additional_image_tokens": 0})
    assert read_geometry(tmp_path) == Geometry(28, 14, ((28, 56),), 0)
    write("adapter_config.json", {"base_model_name_or_path": str(tmp_path / "nothing")})
    assert read_geometry(tmp_path) == Geometry(), "an adapter has its base's"
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json"):
        read_geometry(tmp_path)
