"""Damaged pictures: JPEGs that Pillow decodes without a word, no false alarm on sound ones, and a fuzz test."""

import math
import os
import random

import numpy as np
import pytest
from PIL import Image, ImageOps

from animals.pictures import prepare as data
from animals.pictures import read
from animals.pictures.cache import load_split
from tests.helpers.pictures import drawn, excluded, saved, train
from tests.test_read import ODD_FILES

WAYS = {  # how a JPEG is written
    "baseline": {},
    "4:4:4": {"subsampling": 0, "quality": 95},
    "optimised": {"optimize": True},
    "coarse": {"optimize": True, "quality": 10},
    "restarts": {"restart_marker_blocks": 3},
    "progressive": {"progressive": True},
    "progressive 4:4:4": {"progressive": True, "subsampling": 0, "quality": 95},
}
SEQUENTIAL = [way for way in WAYS if "progressive" not in way]


def photograph() -> Image.Image:
    """400x300 pixels with detail everywhere."""
    grain = np.random.default_rng(2).normal(0, 12, (300, 400, 1))
    return Image.fromarray((np.asarray(drawn(1, (400, 300))) + grain).clip(0, 255).astype(np.uint8))


def sound() -> dict[str, Image.Image]:
    """Pictures whose lower part, or all of them, is flat."""
    photo, mask = photograph(), Image.new("L", (400, 300))
    mask.paste(255, (100, 80, 300, 200))
    pictures = {"photograph": photo, "grey": photo.convert("L"), "CMYK": photo.convert("CMYK")}
    for colour in ("white", "black"):
        pictures[f"{colour} bars"] = ImageOps.pad(photo, (400, 900), color=colour)
        pictures[f"cut out on {colour}"] = Image.composite(photo, Image.new("RGB", photo.size, colour), mask)
        pictures[f"all {colour}"] = Image.new("RGB", (1600, 1200), colour)
    ramp = np.linspace(0, 255, 2048, dtype=np.uint8)
    return pictures | {"ramp": Image.fromarray(np.tile(ramp[::-1], (64, 1)))}


def verdict(content: bytes) -> str:
    """The category of the error, "" for a picture that is used; the same whether it is decoded smaller or not."""
    found = set()
    for enough in (None, 40):
        try:
            read.read_picture(content, enough)
            found.add("")
        except read.PictureError as error:
            found.add(str(error).partition(":")[0])
    [category] = found
    return category


def scan(content: bytes) -> tuple[int, int]:
    """Where the data of the first scan begins, where the file's last scan ends."""
    at = content.index(b"\xff\xda")
    return at + 2 + int.from_bytes(content[at + 2 : at + 4]), len(content) - 2


def cut(content: bytes, share: float) -> bytes:
    """What is left of the data is closed with an end marker, as some programs close a broken download."""
    start, end = scan(content)
    return content[: start + int(share * (end - start))].rstrip(b"\xff") + b"\xff\xd9"


def zeroed(content: bytes, share: float, n: int) -> bytes:
    start, end = scan(content)
    at = start + int(share * (end - start))
    return (content[:at] + bytes(n) + content[at + n :])[:end] + content[end:]


@pytest.mark.parametrize("way", WAYS)
def test_a_sound_jpeg_is_no_false_alarm(way):
    for name, picture in sound().items():
        content = saved(picture, "JPEG", **WAYS[way])
        for more in (b"", b"\0" * 999, content):  # what cameras leave behind the end: padding, a second picture
            assert verdict(content + more) == "", name
    if way != "coarse":  # where zeros stand for a flat area, padding cannot be told from damage
        content = saved(photograph(), "JPEG", **WAYS[way])
        assert verdict(content[:-2] + bytes(999) + content[-2:]) == "", "padded"


@pytest.mark.parametrize("way", WAYS)
def test_a_cut_jpeg_is_truncated_with_an_end_marker_too(way):
    content = saved(photograph(), "JPEG", **WAYS[way])
    for share in (0.1, 0.33, 0.66, 0.9, 0.99) if way in SEQUENTIAL else (0.1, 0.33):
        assert verdict(cut(content, share)) == "truncated", share
        assert verdict(cut(content, share)[:-2]) == "truncated", share
    assert verdict(cut(content, 0.5)[:-2] + content) in ("truncated", "damaged")  # another marker ends the data, too
    if way in ("baseline", "4:4:4", "optimised"):  # bytes lost in the middle
        assert verdict(content[: len(content) // 2] + content[len(content) // 2 + 700 :]) == "truncated"


@pytest.mark.parametrize("way", SEQUENTIAL)
def test_a_zeroed_part_of_a_jpeg_is_damage(way):
    content = saved(photograph(), "JPEG", **WAYS[way])
    for share, n in ((0.05, 512), (0.3, 100), (0.5, 4096), (0.9, 10**6)):
        assert verdict(zeroed(content, share, n)) in ("damaged", "truncated"), (share, n)


def test_zeros_that_stand_for_a_flat_area_are_damage_if_they_are_too_many():
    """On a cut-out the shortest code stands for a flat area, so the zeros alone say nothing."""
    content = saved(sound()["cut out on white"].resize((1600, 1200)), "JPEG", optimize=True)
    start, end = scan(content)
    assert bytes(64) in content[start:end] and verdict(content) == ""
    middle = (start + end) // 2
    assert verdict(content[:middle] + bytes(2000) + content[middle:]) == "damaged"
    assert verdict(zeroed(content, 0.5, 3000)) == "damaged"


def mutated(rng, content: bytes) -> bytes:
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 5))):
        at, n = rng.randrange(max(len(content), 1)), rng.randrange(1, 50)
        header = slice(at % 64, at % 64 + 4)  # sizes, offsets
        cuts = (slice(at, None), b""), (slice(at, at + n), b"")
        writes = (slice(at, at + 1), rng.randbytes(1)), (slice(at, at), rng.randbytes(n)), (header, rng.randbytes(4))
        where, new = rng.choice([*cuts, *writes])
        content[where] = new
    return bytes(content)


def test_fuzz_the_cache_never_promises_what_training_cannot_decode(tree):
    rng = random.Random(0)
    seeds = [content for _, content, reason, _ in ODD_FILES if not reason]
    seeds.append(saved(drawn(9), "TIFF", compression="tiff_lzw"))
    for progressive in (False, True):  # large: decoded at half their size in training
        seeds.append(saved(drawn(7, (2048, 2020)), "JPEG", quality=5, progressive=progressive))
    for i in range(600):
        train(tree, "cat", f"fuzz{i:03}.jpg").write_bytes(mutated(rng, seeds[i % len(seeds)]))
    tree.allow_leaks = True  # some mutations change no pixel
    summary = data.prepare(tree)["train"]
    assert summary["n"] + sum(summary["excluded"].values()) == 612
    reasons, used = excluded(tree), {row["images"][0]: row for row in load_split(tree, "train")}
    assert min(len(reasons), len(used)) > 150
    for i in range(600):
        path = str(train(tree, "cat", f"fuzz{i:03}.jpg"))
        try:
            picture = read.load_picture(path)
        except read.PictureError as error:
            assert reasons[os.path.basename(path)] == str(error) and path not in used
        else:
            size = used[path]["width"], used[path]["height"]
            assert picture.mode == "RGB" and picture.size in (size, tuple(math.ceil(side / 2) for side in size))
