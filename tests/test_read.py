"""The one way pixels are read: what is read, what is refused, which files of a folder count."""

import os
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from animals.checkpoint.image_tokens import image_token_count
from animals.pictures import cache, inspection, read
from animals.pictures import prepare as data
from animals.pictures.cache import load_split
from tests.helpers.pictures import JPEG, PNG, drawn, excluded, images, make_tree, problems, python, saved, train

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


def text(megabytes, parts=1) -> bytes:
    """A PNG with so many megabytes in each of its texts, compressed."""
    info = PngImagePlugin.PngInfo()
    for i in range(parts):
        info.add_text(f"text {i}", "x" * (megabytes << 20), zip=True)
    return saved(drawn(1), "PNG", pnginfo=info)


def tiff(bands) -> bytes:
    """A sound uncompressed TIFF of 64x48 pixels with so many colours of 8 bits."""
    entries = [  # tag, type (3: 16 bits, 4: 32 bits), how many, value or offset
        (256, 3, 1, 64), (257, 3, 1, 48), (258, 3, bands, 150), (259, 3, 1, 1), (262, 3, 1, 2),
        (273, 4, 1, 200), (277, 3, 1, bands), (278, 3, 1, 48), (279, 4, 1, 64 * 48 * bands),
    ]  # fmt: skip
    head = struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + b"".join(struct.pack("<HHII", *e) for e in entries)
    return (head.ljust(150, b"\0") + struct.pack(f"<{bands}H", *[8] * bands)).ljust(200, b"\0") + bytes(64 * 48 * bands)


ODD_FILES = [  # name, bytes, "" if it is used or the start of the reason, size if it is used
    ("truncated.jpg", JPEG[: len(JPEG) // 2], "truncated", None),
    ("truncated.png", PNG[: len(PNG) // 2], "truncated", None),
    ("zero.jpg", b"", "empty file", None),
    ("text.jpg", b"this is no picture", "not a picture", None),
    ("page.jpg", b"<!DOCTYPE html><html><body>404</body></html>", "not a picture: a web page", None),
    ("pointer.jpg", b"version https://git-lfs.github.com/spec/v1\noid", "not a picture: a Git LFS pointer", None),
    ("film.jpg", b"\0\0\0 ftypisom", "not a picture: a video", None),
    ("phone.jpg", b"\0\0\0\x18ftypheic", "HEIC is not read: convert it to JPEG", None),
    ("phone.heic", b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIC is not read: convert it to JPEG", None),
    ("scan.jp2", b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000 is not read: convert it to JPEG", None),
    ("new.jxl", b"\xff\x0a\xfa\x9f", "JPEG XL is not read: convert it to JPEG", None),
    ("camera.NEF", saved(drawn(1), "TIFF"), "raw is not read: convert it to JPEG", None),
    ("logo.svg", b"<?xml version='1.0'?>\n<svg xmlns='x'/>", "SVG is not read: convert it to JPEG", None),
    ("five bands.tif", tiff(bands=5), "cannot be opened: it begins as TIFF", None),
    ("three bands.tif", tiff(bands=3), "", (64, 48)),
    ("jpeg.heic", JPEG, "", (64, 48)),
    ("no extension", JPEG, "", (64, 48)),
    ("no extension either", b"\0\0\0\x18ftypheic", "HEIC is not read", None),
    ("3 MB of text.png", text(3), "", (64, 48)),
    ("3 MB of profile.png", saved(drawn(1), "PNG", icc_profile=bytes(3 << 20)), "", (64, 48)),
    ("17 MB of text.png", text(17), "damaged", None),
    ("75 MB of text.png", text(15, 5), "damaged", None),
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
    ("cut.avif", saved(drawn(1), "AVIF")[:400], "cannot be opened", None),
    ("plain.bmp", saved(drawn(1), "BMP"), "", (64, 48)),
    ("rotated.jpg", saved(drawn(1), "JPEG", exif=TURNED), "", (48, 64)),
    ("one_pixel.png", saved(Image.new("RGB", (1, 1)), "PNG"), "too small", None),
    ("strip.png", saved(drawn(1, (8000, 10)), "PNG"), "", (8000, 10)),
    ("bomb.png", bomb(), "too many pixels", None),
    ("Löwe 狮子.jpg", JPEG, "", (64, 48)),
    ("with space.jpg", JPEG, "", (64, 48)),
    ("comma, and \"quotes\".jpg", JPEG, "", (64, 48)),
    ("UPPER.JPG", JPEG, "", (64, 48)),
    ("photoshop.jpg", b"8BPS" + JPEG, "Photoshop is not read", None),
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
    for name in (".DS_Store", "Thumbs.db", "notes.txt", "labels.txt", "LICENSE", "odd.\x1b[31m"):
        (cat / name).write_bytes(b"x")
    os.mkfifo(cat / "pipe")
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
    others = {"hidden": 2, ".db": 1, ".txt": 2, "no extension": 2, "others": 1, "folder linked twice": 1}
    assert summary["ignored"] == others
    cats = [f"train_data/cat/{name}" for name in ("0.jpg", "1.jpg", "2.jpg", "3.jpg", "a/b/deep.png", "link.jpg")]
    assert [path for path in images(tree) if "/cat/" in path] == cats
    assert summary["classes"]["spider"] == 4
    listed = [str(cat / name) for name in ("0.jpg", "1.jpg", "2.jpg", "3.jpg", "a/b/deep.png")]
    assert read.list_pictures(cat)[:5] == listed and read.list_pictures(listed[0]) == listed[:1]


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


def test_pictures_of_formats_that_are_not_read_count_as_excluded(tree):
    """Not as ignored files: a class of 4 JPEG and 40 HEIC must not train."""
    tree.max_excluded = 0.01
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    for i in range(40):
        train(tree, "cat", f"IMG_{i}" if i % 2 else f"IMG_{i}.HEIC").write_bytes(heic)
    assert "40 of 52 pictures unusable (HEIC is not read 40)" in problems(tree, splits=["train"])[0]
    before = cache.listing(tree, "train")[2]
    train(tree, "cat", "IMG_1").write_bytes(JPEG)
    assert cache.listing(tree, "train")[2] != before
    tree.max_excluded = 1.0
    summary = data.prepare(tree)["train"]
    assert summary["excluded"] == {"HEIC is not read": 39} and summary["ignored"] == {}
    assert "train_data/cat/IMG_1" in images(tree)
