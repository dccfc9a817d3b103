"""The one way pixels are read: what is read, what is refused, which files of a folder count."""

import math
import os
import pickle
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from animals.checkpoint.image_tokens import image_token_count
from animals.pictures import inspection, read
from animals.pictures import prepare as data
from animals.pictures.cache import load_split
from tests.helpers.pictures import JPEG, PNG, drawn, excluded, images, make_tree, python, saved, train

LOSSLESS = {"WEBP": {"lossless": True}}
TURNED = Image.Exif()
TURNED[0x0112] = 6  # turn by 90 degrees to view


def frames(format) -> bytes:
    return saved(drawn(1), format, save_all=True, append_images=[drawn(2), drawn(3)], **LOSSLESS.get(format, {}))


def grey16() -> bytes:
    ramp = np.linspace(0, 65535, 64 * 48).astype(np.uint16).reshape(48, 64)
    return saved(Image.fromarray(ramp), "PNG")


def half_transparent(mode) -> bytes:
    """Left half opaque black, right half transparent black."""
    if mode == "P":
        picture = Image.new("P", (64, 48), 0)
        picture.putpalette([0, 0, 0, 0, 0, 0])
        picture.paste(1, (32, 0, 64, 48))
        return saved(picture, "PNG", transparency=1)
    picture = Image.new("RGBA", (64, 48), (0, 0, 0, 255))
    picture.paste((0, 0, 0, 0), (32, 0, 64, 48))
    return saved(picture.convert(mode), "PNG")


def bomb() -> bytes:
    """A PNG that declares 50,000 x 50,000 pixels."""
    header = b"IHDR" + struct.pack(">II", 50_000, 50_000) + PNG[24:29]
    return PNG[:12] + header + struct.pack(">I", zlib.crc32(header)) + PNG[33:]


ODD_FILES = [  # name, bytes, "" if it is used or the start of the reason, size if it is used
    ("truncated.jpg", JPEG[: len(JPEG) // 2], "truncated", None),
    ("truncated.png", PNG[: len(PNG) // 2], "truncated", None),
    ("zero.jpg", b"", "empty file", None),
    ("text.jpg", b"this is no picture", "not a picture", None),
    ("page.jpg", b"<!DOCTYPE html><html><body>404</body></html>", "not a picture", None),
    ("crc.png", PNG[:60] + bytes([PNG[60] ^ 255]) + PNG[61:], "damaged", None),
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
    ("photo.avif", saved(drawn(1), "AVIF", quality=90), "", (64, 48)),
    ("cut.avif", saved(drawn(1), "AVIF")[:400], "not a picture", None),
    ("plain.bmp", saved(drawn(1), "BMP"), "", (64, 48)),
    ("rotated.jpg", saved(drawn(1), "JPEG", exif=TURNED), "", (48, 64)),
    ("one_pixel.png", saved(Image.new("RGB", (1, 1)), "PNG"), "too small", None),
    ("strip.png", saved(drawn(1, (8000, 10)), "PNG"), "", (8000, 10)),
    ("bomb.png", bomb(), "too many pixels", None),
    ("Löwe 狮子.jpg", JPEG, "", (64, 48)),
    ("with space.jpg", JPEG, "", (64, 48)),
    ("comma, and \"quotes\".jpg", JPEG, "", (64, 48)),
    ("UPPER.JPG", JPEG, "", (64, 48)),
    ("photoshop.jpg", b"8BPS" + JPEG, "not a picture", None),
    ("script.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 48\n", "not a picture", None),
]  # fmt: skip


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """One build with every odd file in train_data/cat: (config, rows by name, reasons by name)."""
    config = make_tree(tmp_path_factory.mktemp("odd"))
    for name, content, _, _ in ODD_FILES:
        train(config, "cat", name).write_bytes(content)
    data.prepare(config)
    rows = {Path(row["images"][0]).name: row for row in load_split(config, "train")}
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
    whole.save(tmp_path / "large.jpg", quality=95, exif=TURNED)
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
    for name in ("animated.gif", "animated.webp", "pages.tif"):
        assert Image.open(train(config, "cat", name)).n_frames == 3  # they are what they claim to be
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
    picture, paths = drawn(1).quantize(16).convert("RGB"), [tmp_path / f"x.{e}" for e in ("png", "bmp", "tiff", "gif")]
    for path in paths:
        picture.save(path)
    picture.save(tmp_path / "x.webp", lossless=True)
    drawn(2).save(tmp_path / "y.jpg")
    read.load_picture(tmp_path / "y.jpg").save(tmp_path / "y.png")
    facts = list(map(inspection.inspect, [*paths, tmp_path / "x.webp"]))
    assert len({f.pixels for f in facts}) == 1 and len({f.sha256 for f in facts}) == 5
    assert len({f.pixels for f in map(inspection.inspect, tmp_path.glob("y.*"))}) == 1


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path):
    (tmp_path / "bomb.png").write_bytes(bomb())
    script = (
        "from animals.pictures import read\n"
        "try: read.load_picture('bomb.png')\n"
        "except read.PictureError as error: print(error)\n"
        # of this program alone: ru_maxrss would count what it was forked from
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    reason, peak_kib = python(script, cwd=tmp_path).stdout.splitlines()
    assert reason.startswith("too many pixels") and int(peak_kib) < 300_000  # decoded it would be 7.5 GB


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
    Path(os.fsdecode(name)).write_bytes(JPEG)
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
    found = read.list_pictures(train(tree, "cat"))
    assert [Path(path).name for path in found] == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    assert read.list_pictures(found[0]) == [found[0]]


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
