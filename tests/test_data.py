"""Pictures and caches: what is read, what is refused, when a cache is stale, that two processes build it once."""

import csv
import io
import json
import math
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

from animals.checkpoint.tokens import Geometry, image_token_count, read_geometry
from animals.command import UserError, yes_or_no
from animals.pictures import check, read
from animals.pictures import prepare as data
from animals.pictures.leaks import Pictures, groups, near_pairs
from config import Config

ROOT = Path(__file__).resolve().parent.parent
CLASSES = ("cat", "dog", "ragno")


def drawn(seed, size=(64, 48)) -> Image.Image:
    """A picture with a shape of its own."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def saved(picture, format, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


@pytest.fixture
def tree(tmp_path):
    """input/ with three classes of four and two pictures; returns the Config."""
    for split, n in (("train", 4), ("validation", 2)):
        for k, folder in enumerate(CLASSES):
            place = tmp_path / "input" / f"{split}_data" / folder
            place.mkdir(parents=True)
            for i in range(n):
                (place / f"{i}.jpg").write_bytes(saved(drawn(1000 * n + 10 * k + i), "JPEG"))
    return Config(str(tmp_path / "input"), str(tmp_path / "temp"), max_excluded=1.0, data_processes=1)


def train(config, *parts) -> Path:
    return Path(config.input_dir, "train_data", *parts)


def held(config, *parts) -> Path:
    return Path(config.input_dir, "validation_data", *parts)


def excluded(config) -> dict[str, str]:
    with open(Path(config.temp_dir) / "excluded.csv", encoding="utf-8", newline="") as file:
        return {Path(row["image"]).name: row["reason"] for row in csv.DictReader(file)}


def images(config, split="train") -> list[str]:
    return [os.path.relpath(row["images"][0], config.input_dir) for row in data.load_split(config, split)]


def command(*arguments, **options):
    return subprocess.run(
        [sys.executable, ROOT / "data_process_utils.py", *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT, **options,
    )  # fmt: skip


# --- single files: name, bytes, outcome -------------------------------------------------------------------------------

JPEG = saved(drawn(1), "JPEG", quality=90)
PNG = saved(drawn(1), "PNG")


def bomb() -> bytes:
    """A PNG that declares 50,000 x 50,000 pixels."""
    header = b"IHDR" + struct.pack(">II", 50_000, 50_000) + PNG[24:29]
    return PNG[:12] + header + struct.pack(">I", zlib.crc32(header)) + PNG[33:]


def frames(format) -> bytes:
    return saved(drawn(1), format, save_all=True, append_images=[drawn(2), drawn(3)], **LOSSLESS.get(format, {}))


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to view
    return saved(drawn(1), "JPEG", exif=exif)


def grey16() -> bytes:
    ramp = np.linspace(0, 65535, 64 * 48).astype(np.uint16).reshape(48, 64)
    return saved(Image.fromarray(ramp), "PNG")


def half_transparent(mode) -> bytes:
    """Left half opaque black, right half transparent black."""
    picture = Image.new("RGBA", (64, 48), (0, 0, 0, 255))
    picture.paste((0, 0, 0, 0), (32, 0, 64, 48))
    if mode == "P":
        palette = Image.new("P", (64, 48), 0)
        palette.putpalette([0, 0, 0, 0, 0, 0])
        palette.paste(1, (32, 0, 64, 48))
        return saved(palette, "PNG", transparency=1)
    return saved(picture.convert(mode), "PNG")


def damaged_crc() -> bytes:
    return PNG[:60] + bytes([PNG[60] ^ 255]) + PNG[61:]


LOSSLESS = {"WEBP": {"lossless": True}}
ODD_FILES = [  # name, bytes, "" if it is used or the start of the reason, size if it is used
    ("truncated.jpg", JPEG[: len(JPEG) // 2], "truncated", None),
    ("truncated.png", PNG[: len(PNG) // 2], "truncated", None),
    ("zero.jpg", b"", "empty file", None),
    ("text.jpg", b"this is no picture", "not a picture", None),
    ("page.jpg", b"<!DOCTYPE html><html><body>404</body></html>", "not a picture", None),
    ("crc.png", damaged_crc(), "damaged", None),
    ("png_inside.jpg", PNG, "", (64, 48)),
    ("cmyk.jpg", saved(drawn(1).convert("CMYK"), "JPEG"), "", (64, 48)),
    ("grey.jpg", saved(drawn(1).convert("L"), "JPEG"), "", (64, 48)),
    ("grey16.png", grey16(), "", (64, 48)),
    ("float.tiff", saved(Image.fromarray(np.eye(48, 64, dtype=np.float32)), "TIFF"), "", (64, 48)),
    ("one_bit.png", saved(drawn(1).convert("1"), "PNG"), "", (64, 48)),
    ("palette.png", half_transparent("P"), "", (64, 48)),
    ("alpha.png", half_transparent("RGBA"), "", (64, 48)),
    ("grey_alpha.png", half_transparent("LA"), "", (64, 48)),
    ("animated.gif", frames("GIF"), "", (64, 48)),
    ("animated.webp", frames("WEBP"), "", (64, 48)),
    ("pages.tif", frames("TIFF"), "", (64, 48)),
    ("plain.bmp", saved(drawn(1), "BMP"), "", (64, 48)),
    ("rotated.jpg", rotated(), "", (48, 64)),
    ("one_pixel.png", saved(Image.new("RGB", (1, 1)), "PNG"), "too small", None),
    ("strip.png", saved(drawn(1, (8000, 10)), "PNG"), "", (8000, 10)),
    ("bomb.png", bomb(), "too many pixels", None),
    ("Löwe 狮子.jpg", JPEG, "", (64, 48)),
    ("with space.jpg", JPEG, "", (64, 48)),
    ("new\nline, and \"quotes\".jpg", JPEG, "", (64, 48)),
    ("UPPER.JPG", JPEG, "", (64, 48)),
    ("photoshop.jpg", b"8BPS" + JPEG, "not a picture", None),
    ("script.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 48\n", "not a picture", None),
]  # fmt: skip


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """One build with every odd file in train_data/cat: (config, rows by name, reasons by name)."""
    root = tmp_path_factory.mktemp("odd")
    for split in ("train", "validation"):
        for k, folder in enumerate(CLASSES):
            place = root / "input" / f"{split}_data" / folder
            place.mkdir(parents=True)
            (place / "fine.jpg").write_bytes(saved(drawn(50 + k + 10 * len(split)), "JPEG"))
    for name, content, _, _ in ODD_FILES:
        (root / "input" / "train_data" / "cat" / name).write_bytes(content)
    config = Config(input_dir=str(root / "input"), temp_dir=str(root / "temp"), max_excluded=1.0)
    data.prepare(config)
    rows = {Path(row["images"][0]).name: row for row in data.load_split(config, "train")}
    return config, rows, excluded(config)


@pytest.mark.parametrize("name, content, reason, size", ODD_FILES, ids=[repr(row[0]) for row in ODD_FILES])
def test_odd_file(odd, name, content, reason, size):
    config, rows, reasons = odd
    path = train(config, "cat", name)
    if reason:
        assert name not in rows
        assert reasons[name].startswith(reason)
        with pytest.raises(read.PictureError) as error:
            read.load_picture(path)
        assert str(error.value) == reasons[name]
    else:
        assert name not in reasons
        picture = read.load_picture(path)
        assert (picture.mode, picture.size) == ("RGB", size)
        assert (rows[name]["width"], rows[name]["height"]) == size
        assert pickle.loads(pickle.dumps(picture)).tobytes() == picture.tobytes()
        assert not picture.info


def test_a_photograph_is_decoded_at_half_its_size(tmp_path):
    """Sharp enough for every tile, upright, the same picture; other formats and smaller pictures stay whole."""
    whole = drawn(1, (2600, 2100))
    exif = Image.Exif()
    exif[0x0112] = 6
    whole.save(tmp_path / "large.jpg", quality=95, exif=exif)
    whole.save(tmp_path / "large.png")
    drawn(1, (2600, 2000)).save(tmp_path / "smaller.jpg")
    half = read.load_picture(tmp_path / "large.jpg")
    assert half.size == (1050, 1300) and not half.info
    expected = np.asarray(whole.transpose(Image.Transpose.ROTATE_270).resize((1050, 1300)), dtype=int)
    assert abs(np.asarray(half) - expected).mean() < 1
    assert read.load_picture(tmp_path / "large.png").size == (2600, 2100)
    assert read.load_picture(tmp_path / "smaller.jpg").size == (2600, 2000)
    assert image_token_count(*half.size) == image_token_count(2100, 2600)


def test_pixels_are_the_ones_a_viewer_shows(odd):
    config, _, _ = odd
    load = lambda name: np.asarray(read.load_picture(train(config, "cat", name)))  # noqa: E731
    first = np.asarray(drawn(1))
    for name in ("png_inside.jpg", "animated.webp", "pages.tif", "plain.bmp"):
        assert (load(name) == first).all(), name
    assert abs(load("animated.gif").astype(int) - first).mean() < 12  # 256 colours
    for name in ("palette.png", "alpha.png", "grey_alpha.png"):
        assert (load(name)[:, :32] == 0).all() and (load(name)[:, 32:] == 255).all(), name
    assert abs(load("rotated.jpg").astype(int) - np.rot90(first, -1)).mean() < 4
    ramp = load("grey16.png")[:, :, 0].reshape(-1).astype(int)
    assert ramp[0] == 0 and ramp[-1] == 255 and (np.diff(ramp) >= 0).all() and abs(ramp.mean() - 127.5) < 1
    assert load("float.tiff").max() == 255
    assert abs(load("cmyk.jpg").astype(int) - first).mean() < 12
    assert set(np.unique(load("one_bit.png"))) == {0, 255}


def test_equal_pixels_have_equal_hashes_in_every_format(tmp_path):
    paths = []
    for format in ("PNG", "BMP", "TIFF", "WEBP", "GIF"):
        picture = drawn(1).quantize(16).convert("RGB")
        paths.append(tmp_path / f"x.{format.lower()}")
        paths[-1].write_bytes(saved(picture, format, **LOSSLESS.get(format, {})))
    jpeg = tmp_path / "x.jpg"
    jpeg.write_bytes(saved(drawn(2), "JPEG"))
    read.load_picture(jpeg).save(tmp_path / "y.png")
    facts = check.inspect(paths)
    assert len({f.pixels for f in facts}) == 1 and len({f.sha256 for f in facts}) == 5
    assert len({f.pixels for f in check.inspect([jpeg, tmp_path / "y.png"])}) == 1


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path):
    (tmp_path / "bomb.png").write_bytes(bomb())
    script = (
        "from animals.pictures import read\n"
        "try: read.load_picture('bomb.png')\n"
        "except read.PictureError as error: print(error)\n"
        # of this program alone: ru_maxrss would count what it was forked from
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, env=with_root())
    reason, peak_kib = done.stdout.splitlines()
    assert reason.startswith("too many pixels") and int(peak_kib) < 300_000  # decoded it would be 7.5 GB


def with_root():
    return {**os.environ, "PYTHONPATH": str(ROOT)}


# --- folders ----------------------------------------------------------------------------------------------------------


def test_odd_folders(tree):
    """Hidden files, stray files, nested folders, links and loops, a folder named like a picture, a pipe."""
    cat = train(tree, "cat")
    (cat / ".hidden.jpg").write_bytes(JPEG)
    for name in (".DS_Store", "Thumbs.db", "notes.txt", "labels.txt"):
        (cat / name).write_bytes(b"x")
    (cat / "a" / "b").mkdir(parents=True)
    (cat / "a" / "b" / "deep.png").write_bytes(PNG)
    (cat / "a" / "loop").symlink_to(cat, target_is_directory=True)
    (cat / "broken.jpg").symlink_to(cat / "nowhere.jpg")
    (cat / "self.jpg").symlink_to(cat / "self.jpg")
    (cat / "folder.jpg").mkdir()
    os.mkfifo(cat / "pipe.jpg")
    (cat / "link.jpg").symlink_to(cat / "0.jpg")
    os.rename(train(tree, "ragno"), Path(tree.input_dir) / "elsewhere")
    train(tree, "ragno").symlink_to(Path(tree.input_dir) / "elsewhere", target_is_directory=True)
    train(tree, "README.md").write_text("stray")
    summary = data.prepare(tree)["train"]
    assert excluded(tree) == {
        "broken.jpg": "broken link",
        "self.jpg": "unreadable: Too many levels of symbolic links",
        "folder.jpg": "is a directory",
        "pipe.jpg": "not a regular file",
    }
    assert summary["ignored"] == {"hidden": 2, ".db": 1, ".txt": 2, "folder linked twice": 1}
    cats = [f"train_data/cat/{name}" for name in ("0.jpg", "1.jpg", "2.jpg", "3.jpg", "a/b/deep.png", "link.jpg")]
    assert [path for path in images(tree) if "/cat/" in path] == cats
    assert summary["classes"]["spider"] == 4


def test_a_name_that_is_not_utf8_is_excluded(tree):
    name = os.path.join(os.fsencode(train(tree, "cat")), b"caf\xe9.jpg")
    with open(name, "wb") as file:
        file.write(JPEG)
    assert data.prepare(tree)["train"]["excluded"] == {"name is not UTF-8": 1}
    assert excluded(tree) == {"caf\\udce9.jpg": "name is not UTF-8"}


def test_an_unreadable_file_is_excluded_and_mended_by_chmod(tree):
    secret = train(tree, "cat", "0.jpg")
    secret.chmod(0)
    if os.geteuid() == 0:  # root may read everything: look as somebody else
        os.seteuid(65534)
        try:
            with pytest.raises(read.PictureError, match="unreadable: Permission denied"):
                read.load_picture(secret)
        finally:
            os.seteuid(0)
    else:
        assert data.prepare(tree)["train"]["excluded"] == {"unreadable": 1}
        secret.chmod(0o600)
        assert data.prepare(tree)["train"]["excluded"] == {}


def test_list_pictures(tree):
    train(tree, "cat", "x.txt").write_text("x")
    strays = data_counter()
    found = read.list_pictures(train(tree, "cat"), strays)
    assert [Path(path).name for path in found] == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"] and strays == {".txt": 1}
    assert read.list_pictures(found[0]) == [found[0]]


def data_counter():
    from collections import Counter

    return Counter()


# --- problems and their wording ---------------------------------------------------------------------------------------


def problems(config, **more) -> list[str]:
    with pytest.raises(UserError) as error:
        data.prepare(config, **more)
    return str(error.value).splitlines()


def test_an_empty_input_folder_says_what_to_do(tmp_path):
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "README.md").write_text("pictures go here")
    config = Config(input_dir=str(tmp_path / "input"), temp_dir=str(tmp_path / "temp"))
    first, second = problems(config)
    assert "train_data: not found" in first and "holds README.md" in first and "butterfly, cat" in first
    assert "https://" in first and "--input_dir" in first
    assert "validation_data: not found" in second and "--validation_fraction 0.2 --seed 42" in second
    done = command("--input_dir", config.input_dir, "--temp_dir", config.temp_dir)
    assert done.returncode == 2 and done.stderr.splitlines() == [f"error: {first}", f"error: {second}"]
    assert not os.path.exists(config.temp_dir)


def test_all_problems_of_the_folders_are_one_error(tree):
    train(tree, "lynx").mkdir()
    held(tree, "cow").mkdir()
    held(tree, "cow", "notes.txt").write_text("x")
    unknown, empty = problems(tree)
    assert unknown.startswith(str(train(tree, "lynx"))) and "butterfly, cat, chicken" in unknown
    assert empty.startswith(str(held(tree, "cow"))) and "found no picture (.txt 1)" in empty


def test_a_class_without_a_usable_picture_is_an_error(tree):
    for path in train(tree, "dog").iterdir():
        path.write_bytes(JPEG[:100])
    (line,) = problems(tree)
    assert line.startswith(str(train(tree, "dog"))) and "no usable picture" in line and "excluded.csv" in line
    (line,) = problems(tree)  # the second time too, from the cache
    assert "no usable picture" in line


def test_too_many_excluded_stops_with_the_list(tree):
    train(tree, "cat", "0.jpg").write_bytes(JPEG[:100])
    strict = Config(input_dir=tree.input_dir, temp_dir=tree.temp_dir)
    (line,) = problems(strict)
    assert "1 of 12 pictures unusable (not a picture 1)" in line or "1 of 12 pictures unusable (truncated 1)" in line
    assert str(Path(tree.temp_dir) / "excluded.csv") in line and list(excluded(tree)) == ["0.jpg"]
    assert data.prepare(tree)["train"]["n"] == 11


def test_a_class_of_the_table_without_folder_is_a_warning(tree):
    summary = data.prepare(tree)["train"]
    (line,) = summary["warnings"]
    assert "butterfly, chicken, cow" in line
    assert list(summary["classes"])[0] == "butterfly" and summary["classes"]["butterfly"] == 0


def test_one_class_is_not_enough(tree):
    for folder in ("dog", "ragno"):
        shutil.rmtree(train(tree, folder))
    (line,) = problems(tree)
    assert "found 1 class folders (cat); expected at least two" in line


# --- rows -------------------------------------------------------------------------------------------------------------


def test_rows(tree):
    data.prepare(tree)
    rows = data.load_split(tree, "train")
    with open(Path(tree.temp_dir) / "train.json", encoding="utf-8") as file:
        plain = json.load(file)
    assert len(rows) == len(plain) == 12
    assert plain[-1]["messages"] == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": tree.question}]},
        {"role": "assistant", "content": [{"type": "text", "text": "spider"}]},
    ]
    assert plain[-1]["images"] == [str(train(tree, "ragno", "3.jpg"))] and plain[-1]["label"] == "spider"
    from datasets import load_dataset

    others = load_dataset(
        "json", data_files=f"{tree.temp_dir}/train.json", split="train", cache_dir=f"{tree.temp_dir}/hf"
    )
    assert others.to_list() == plain
    for row, line in zip(rows, plain, strict=True):
        question, answer = row["messages"]
        assert question["content"][0] == {"type": "image", "text": None}  # Arrow has one type for all parts
        assert [question["content"][1], answer] == [line["messages"][0]["content"][1], line["messages"][1]]
        for column in ("images", "label", "width", "height", "image_tokens", "sha256"):
            assert row[column] == line[column]


def test_nothing_is_written_outside_temp(tree, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    before = sorted(os.walk(tree.input_dir))
    script = (
        "import sys; from animals.pictures import prepare as d; from config import Config\n"
        "c = Config(input_dir=sys.argv[1], temp_dir=sys.argv[2])\n"
        "d.prepare(c); s = d.load_split(c, 'train').map(lambda row: {'n': 1}); print(len(s), 'torch' in sys.modules)"
    )
    environment = {k: v for k, v in with_root().items() if not k.startswith(("HF_", "XDG_"))} | {"HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", script, tree.input_dir, tree.temp_dir], env=environment, capture_output=True, text=True
    )
    assert done.stdout.split()[0] == "12", done.stderr
    assert list(home.rglob("*")) == [] and sorted(os.walk(tree.input_dir)) == before


def test_import_and_help_need_no_torch():
    script = (
        "import sys, data_process_utils; sys.argv = ['x', '--help']\n"
        "try: data_process_utils.main()\n"
        "except SystemExit: print(sorted({'torch', 'transformers', 'datasets', 'pyarrow', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], env=with_root(), capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]" and "--validation_fraction" in done.stdout


def test_flags_are_strict():
    for arguments in (["--validation_frac", "0.2"], ["--nonsense"], ["--allow_leaks", "maybe"]):
        assert command(*arguments).returncode == 2


# --- image tokens -----------------------------------------------------------------------------------------------------

HUB_SIZES = {
    (200, 300): 1464, (225, 300): 1368, (300, 300): 1176, (300, 225): 1032, (336, 336): 1176, (400, 300): 1376,
    (336, 672): 1752, (480, 640): 2340, (672, 672): 2928, (768, 1024): 2340, (1008, 336): 2376, (300, 1200): 1890,
}  # (height, width): tokens of LLaVA-1.6-Mistral-7B  # fmt: skip


def test_image_tokens_of_the_stock_checkpoint():
    for (height, width), tokens in HUB_SIZES.items():
        assert image_token_count(width, height, Geometry()) == tokens


@pytest.mark.parametrize(
    "geometry",
    [
        Geometry(),
        Geometry(56, 14, ((56, 112), (112, 56), (112, 112)), 1, "default"),
        Geometry(48, 8, ((48, 96), (96, 48)), 0, "full"),
    ],
)
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
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json"):
        read_geometry(tmp_path)


# --- freshness --------------------------------------------------------------------------------------------------------


def state(config) -> dict:
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in Path(config.temp_dir).iterdir()}


def test_an_unchanged_tree_is_not_read_again(tree):
    assert data.prepare(tree)["train"]["built"]
    before = state(tree)
    summary = data.prepare(tree)["train"]
    assert not summary["built"] and state(tree) == before


def test_changes_are_seen_and_only_they_are_decoded(tree):
    data.prepare(tree)
    cat = train(tree, "cat")
    (cat / "new.png").write_bytes(PNG)
    summary = data.prepare(tree)["train"]
    assert (summary["n"], summary["decoded"]) == (13, 1)
    (cat / "new.png").unlink()
    summary = data.prepare(tree)["train"]
    assert (summary["n"], summary["decoded"]) == (12, 0)
    old = (cat / "0.jpg").stat()
    content = bytearray((cat / "0.jpg").read_bytes())
    (cat / "0.jpg").unlink()
    (cat / "0.jpg").write_bytes(bytes(content[:100]) + bytes(len(content) - 100))  # same size, other content
    os.utime(cat / "0.jpg", ns=(old.st_atime_ns, old.st_mtime_ns))  # same time too
    summary = data.prepare(tree)["train"]
    assert (summary["n"], summary["decoded"]) == (11, 1)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"prompt": "Which animal? {labels}"}, "Which animal? butterfly"),
        ({"answer": "a {label}"}, '"a cat"'),
        ({"folder_to_label": {"dog": "hound", "cat": "cat", "ragno": "spider"}}, '"hound"'),
    ],
)
def test_another_wording_rewrites_the_rows_and_decodes_nothing(tree, change, text):
    before = data.prepare(tree)
    changed = Config(input_dir=tree.input_dir, temp_dir=tree.temp_dir, max_excluded=1.0, **change)
    after = data.prepare(changed)
    assert after["train"]["built"] and after["train"]["decoded"] == 0
    assert before["train"]["fingerprint"] != after["train"]["fingerprint"]
    assert text in (Path(tree.temp_dir) / "train.json").read_text()
    assert data.load_split(changed, "train")[0]["messages"][0]["content"][1]["text"] == changed.question


def test_another_geometry_rewrites_the_counts_and_decodes_nothing(tree, tmp_path):
    before = data.prepare(tree)["train"]
    (tmp_path / "model").mkdir()
    tiny = {"vision_config": {"image_size": 48, "patch_size": 8}, "image_grid_pinpoints": [[48, 96], [96, 48]]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(tiny))
    after = data.prepare(tree, model_name_or_path=tmp_path / "model")["train"]
    assert after["decoded"] == 0 and after["image_tokens"] != before["image_tokens"]
    row = data.load_split(tree, "train")[0]
    assert row["image_tokens"] == image_token_count(64, 48, read_geometry(tmp_path / "model"))


@pytest.mark.parametrize("suffix", ["json", "arrow", "checked.arrow", "meta.json"])
@pytest.mark.parametrize("harm", ["removed", "cut short"])
def test_a_harmed_cache_is_rebuilt(tree, suffix, harm):
    data.prepare(tree)
    path = Path(tree.temp_dir) / f"train.{suffix}"
    if harm == "removed":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:50])
    assert data.prepare(tree)["train"]["built"]
    assert (
        len(json.loads((Path(tree.temp_dir) / "train.json").read_text())) == len(data.load_split(tree, "train")) == 12
    )


def test_a_cache_of_another_format_is_rebuilt(tree):
    data.prepare(tree)
    path = Path(tree.temp_dir) / "train.meta.json"
    meta = json.loads(path.read_text())
    meta["decoder"][0] += 1
    path.write_text(json.dumps(meta))
    assert data.prepare(tree)["train"]["decoded"] == 12


def test_a_picture_that_vanishes_after_the_check_is_an_error_that_names_it(tree):
    data.prepare(tree)
    path = data.load_split(tree, "train")[0]["images"][0]
    os.unlink(path)
    with pytest.raises(read.PictureError, match="missing"):
        read.load_picture(path)
    assert data.prepare(tree)["train"]["n"] == 11


def test_four_processes_at_once_build_once(tree):
    script = (
        "import sys; from animals.pictures import prepare as d; from config import Config\n"
        "s = d.prepare(Config(input_dir=sys.argv[1], temp_dir=sys.argv[2]))\n"
        "print(s['train']['built'], s['validation']['built'], len(d.load_split(Config(temp_dir=sys.argv[2]), 'train')))"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", script, tree.input_dir, tree.temp_dir], env=with_root(), stdout=-1)
        for _ in range(4)
    ]
    said = sorted(process.communicate()[0].decode().strip() for process in started)
    assert said == ["False False 12"] * 3 + ["True True 12"]


def test_killed_builds_leave_a_usable_state(tree):
    arguments = [sys.executable, ROOT / "data_process_utils.py", "--max_excluded", "1"]
    arguments += ["--input_dir", tree.input_dir, "--temp_dir", tree.temp_dir]
    rng = random.Random(0)
    for _ in range(4):
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.1, 0.8))
        process.kill()
        process.wait()
    assert data.prepare(tree)["train"]["n"] == 12
    assert len(data.load_split(tree, "train")) == 12 and not data.prepare(tree)["train"]["built"]


# --- the verdict of the cache is the verdict of training --------------------------------------------------------------


def mutated(rng, content: bytes) -> bytes:
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 5))):
        kind, at = rng.randrange(5), rng.randrange(max(len(content), 1))
        if kind == 0 and content:
            content[min(at, len(content) - 1)] = rng.randrange(256)
        elif kind == 1:
            del content[at:]
        elif kind == 2:
            del content[at : at + rng.randrange(1, 50)]
        elif kind == 3:
            content[at:at] = rng.randbytes(rng.randrange(1, 50))
        else:
            content[at % 64 : at % 64 + 4] = rng.randbytes(4)  # headers: sizes, offsets
    return bytes(content)


def test_fuzz_the_cache_never_promises_what_training_cannot_decode(tree):
    rng = random.Random(0)
    seeds = [saved(drawn(i, (40, 30)), f) for i, f in enumerate(("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"))]
    seeds += [frames("GIF"), frames("WEBP"), rotated(), grey16(), half_transparent("P")]
    seeds.append(saved(drawn(9), "TIFF", compression="tiff_lzw"))
    for progressive in (False, True):  # large: decoded at half their size in training
        seeds.append(saved(drawn(7, (2048, 2020)), "JPEG", quality=5, progressive=progressive))
    for i in range(600):
        train(tree, "cat", f"fuzz{i:03}.jpg").write_bytes(mutated(rng, seeds[i % len(seeds)]))
    tree.allow_leaks = True  # some mutations change no pixel
    summary = data.prepare(tree)["train"]
    assert summary["n"] + sum(summary["excluded"].values()) == 612
    reasons, used = excluded(tree), {row["images"][0]: row for row in data.load_split(tree, "train")}
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


def test_a_decoder_that_crashes_costs_one_picture(tree, tmp_path):
    """The worker is killed on one picture; the others of its batch are asked again."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if sys.argv[0].endswith('check.py') or sys.orig_argv[-1] == 'animals.pictures.check':\n"
        "    import pathlib, PIL.Image\n"
        "    real = PIL.Image.open\n"
        "    def fatal(file, *a, **k):\n"
        "        if file.getbuffer()[:4] == b'BOOM': os.abort()\n"
        "        return real(file, *a, **k)\n"
        "    PIL.Image.open = fatal\n"
    )
    train(tree, "dog", "boom.jpg").write_bytes(b"BOOM")
    done = command(
        "--input_dir", tree.input_dir, "--temp_dir", tree.temp_dir, "--max_excluded", "0.5",
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert excluded(tree) == {"boom.jpg": "damaged: the decoder crashed"}


# --- leaks ------------------------------------------------------------------------------------------------------------


def leaks(config) -> list[tuple]:
    with open(Path(config.temp_dir) / "leaks.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    below = lambda path: os.path.relpath(path, config.input_dir)  # noqa: E731
    return [(row["problem"], row["match"], below(row["image"]), below(row["other_image"])) for row in rows]


def test_clean_splits_have_no_leaks(tree):
    data.prepare(tree)
    assert leaks(tree) == []


def test_the_same_file_in_both_splits_stops(tree):
    shutil.copy(train(tree, "cat", "1.jpg"), held(tree, "cat", "copy.jpg"))
    for _ in range(2):  # built, then from the cache
        (line,) = problems(tree)
        assert "1 same pixels, both splits" in line and "copy.jpg" in line and "--allow_leaks" in line
    assert leaks(tree) == [("both splits", "same pixels", "validation_data/cat/copy.jpg", "train_data/cat/1.jpg")]
    tree.allow_leaks = True
    assert data.prepare(tree)["validation"]["n"] == 7


def test_the_same_pixels_in_another_format_stop(tree):
    read.load_picture(train(tree, "cat", "1.jpg")).save(held(tree, "cat", "copy.png"))
    (line,) = problems(tree)
    assert "1 same pixels, both splits" in line


def test_one_picture_under_two_labels_stops(tree):
    shutil.copy(train(tree, "cat", "1.jpg"), train(tree, "dog", "copy.jpg"))
    (line,) = problems(tree)
    assert "1 same pixels, two labels" in line
    assert leaks(tree) == [("two labels", "same pixels", "train_data/dog/copy.jpg", "train_data/cat/1.jpg")]
    (line,) = problems(tree, splits=("train",))
    assert "two labels" in line and "leaks.train.csv" in line
    data.prepare(tree, splits=("validation",))


def test_two_folders_of_one_label_do_not_conflict(tree):
    shutil.copy(train(tree, "cat", "1.jpg"), train(tree, "dog", "copy.jpg"))
    tree.folder_to_label = {"cat": "pet", "dog": "pet", "ragno": "spider"}
    assert data.prepare(tree)["train"]["classes"] == {"pet": 9, "spider": 4}


def test_a_recompressed_copy_across_splits_warns(tree):
    original = read.load_picture(train(tree, "cat", "1.jpg"))
    original.save(held(tree, "cat", "small.jpg"), quality=40)
    original.resize((128, 96), Image.Resampling.BICUBIC).save(held(tree, "cat", "large.jpg"), quality=80)
    found = data.prepare(tree)["train"]["leaks"]
    assert found["counts"]["near"] == 2 and found["counts"]["same"] == 0
    assert {(match, image, other) for _, match, image, other in leaks(tree)} == {
        ("near", f"validation_data/cat/{name}", "train_data/cat/1.jpg") for name in ("small.jpg", "large.jpg")
    }
    done = command("--input_dir", tree.input_dir, "--temp_dir", tree.temp_dir)
    assert done.returncode == 0 and "2 near, both splits" in done.stdout + done.stderr


def test_flat_pictures_are_compared_by_pixels_only(tree):
    Image.new("RGB", (64, 48), "red").save(train(tree, "cat", "red.png"))
    Image.new("RGB", (64, 48), "blue").save(held(tree, "cat", "blue.png"))
    data.prepare(tree)
    assert leaks(tree) == []


def near_by_hand(a, b, distance) -> set:
    bits = np.bitwise_count(a[:, None] ^ b[None, :])
    return set(zip(*map(list, np.nonzero(bits <= distance)), strict=True))


@pytest.mark.parametrize("distance", [0, 1, 4, 8])
def test_near_pairs_finds_what_comparing_all_pairs_finds(distance):
    rng = np.random.default_rng(distance)
    a = rng.integers(0, 1 << 63, 1500, dtype=np.uint64) * np.uint64(2)
    flips = np.array([sum(1 << int(k) for k in rng.choice(64, n % 10, replace=False)) for n in range(1500)], np.uint64)
    b = a[::-1] ^ flips
    capped = np.zeros(len(a), bool)
    found = {(int(i), int(j)) for x, y, _ in near_pairs(a, b, distance, capped) for i, j in zip(x, y, strict=True)}
    assert found == near_by_hand(a, b, distance) and len(found) > 100 and not capped.any()


def test_look_alikes_without_end_are_capped_and_said():
    rng = np.random.default_rng(0)
    a = np.unique(np.uint64(1 << 63) | rng.integers(0, 1 << 14, 9000, dtype=np.uint64))
    capped = np.zeros(len(a), bool)
    compared = sum(len(i) for i, _, _ in near_pairs(a, a, 4, capped))
    assert capped.any() and compared < len(a) * 1024 * 15


def test_groups_join_equal_and_near_pictures():
    pixels = np.array([[1, 1], [1, 1], [2, 2], [3, 3], [4, 4], [5, 5]], np.uint64)
    phash = np.array([0, 0, 0xFF00FF00FF00FF00, 0xFF00FF00FF00FF01, 0x123456789ABCDEF1, 0], np.uint64)
    zeros = np.zeros(6, np.int32)
    group, capped = groups(Pictures(zeros, zeros, pixels, phash), 4)
    assert group[0] == group[1] and group[2] == group[3] and len(set(group.tolist())) == 4 and capped == 0


def test_the_perceptual_hash_is_imagehashs():
    imagehash = pytest.importorskip("imagehash")
    thumbs = [drawn(seed, (32, 32)).convert("L") for seed in range(200)]
    theirs = [int(str(imagehash.phash(thumb)), 16) for thumb in thumbs]
    assert check.perceptual_hashes(thumbs) == theirs


def test_the_settings_are_checked():
    for name, value in (("max_excluded", 2.0), ("near_duplicate_distance", 9)):
        with pytest.raises(UserError, match=name):
            Config(**{name: value})
    assert yes_or_no("False") is False


def test_animations_have_several_frames():
    """The fixtures are what they claim to be."""
    for format in ("GIF", "WEBP", "TIFF"):
        assert len(list(ImageSequence.Iterator(Image.open(io.BytesIO(frames(format)))))) == 3
