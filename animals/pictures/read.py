"""The one way pixels are read, by load_picture(): in training, validation, test.py and the check of the pictures.

    from animals.pictures.read import load_picture
    picture = load_picture("input/train_data/cat/1.jpg")  # PIL, RGB, 8 bit, upright; PictureError if it is unusable

The content decides and not the name: a PNG called .jpg is read as PNG. Formats: JPEG, PNG, WebP, AVIF, BMP, GIF, TIFF.
To take another one, add it to EXTENSIONS and FORMATS below, and register its plugin here if Pillow cannot decode it.
A picture of another format (HEIC, raw) is an error that says what to do; it counts as a picture, not as a stray file.

- The complete file is decoded, and one that ends early is an error. So is a JPEG that was cut and closed with an end
  marker, or a part of which is zeros, where libjpeg puts grey or patterns without a word. Of 80 photographs as baseline
  JPEGs 3,197 of 3,200 cuts and 4,366 of 4,480 zeroed parts were found; 5,670 sound JPEGs gave no false alarm. It does
  not find a progressive JPEG that is cut in its last scan (some detail is lost from there on), most zeroed parts of
  progressive JPEGs, zeros of less than 64 bytes, and changed bytes where the format has no checksum.
- Of an animation the first frame is read.
- The EXIF orientation is applied. Transparency (alpha or palette) is laid on white. Grey of 16 bit, 32 bit or float is
  scaled to 8 bit. CMYK, grey, palette and 1-bit pictures become RGB.
- More than config.MAX_PIXELS pixels (a decompression bomb) or a side under config.MIN_SIDE is an error before decoding.
- A JPEG whose sides are at least twice 1,008 pixels, the longest side to which the image processor scales any picture,
  is decoded at a half, a quarter or an eighth of its size: 4000x3000 pixels are ready in a third of the time.
- Any aspect ratio is taken: LLaVA-NeXT's image processor scales 8000x10 to 672x1, and the model accepts it.
"""

import io
import os
import re
import stat
import warnings
from collections import Counter
from contextlib import suppress

from PIL import Image, ImageFile, ImageOps, PngImagePlugin, UnidentifiedImageError

from animals.command import UserError
from animals.files import is_hidden, open_regular
from config import MAX_BYTES, MAX_PIXELS, MIN_SIDE

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")  # any case
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF")  # no other decoder is ever run; JPEG's opens MPO too
ENOUGH = 1008  # pixels per side: 3 x 336, the longest side of the largest grid of tiles
RAW = (".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".orf", ".rw2")  # their content is TIFF with a tiny preview
UNREAD = (*RAW, ".heic", ".heif", ".hif", ".jp2", ".j2k", ".jpx", ".jxl", ".psd", ".svg")  # pictures all the same
TO_JPEG = "is not read: convert it to JPEG"
SIGNS = (  # how a file begins -> its format, or why it is excluded
    (rb"\xff\xd8\xff", "JPEG"),
    (rb"\x89PNG\r\n\x1a\n", "PNG"),
    (rb"RIFF....WEBP", "WEBP"),
    (rb"....ftypavi[fs]", "AVIF"),
    (rb"BM....\0\0\0\0", "BMP"),
    (rb"GIF8[79]a", "GIF"),
    (rb"II\*\0|MM\0\*", "TIFF"),
    (rb"....ftyp(hei|hev|mif1|msf1)", f"HEIC {TO_JPEG}"),
    (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", f"JPEG 2000 {TO_JPEG}"),
    (rb"\0\0\0\x0cJXL |\xff\x0a", f"JPEG XL {TO_JPEG}"),
    (rb"....ftypcrx |FUJIFILMCCD-RAW|IIR[OS]|IIU\0", f"raw {TO_JPEG}"),
    (rb"8BPS", f"Photoshop {TO_JPEG}"),
    (rb"\s*(<\?xml.*)?<svg", f"SVG {TO_JPEG}"),
    (rb"version https://git-lfs", "not a picture: a Git LFS pointer; `git lfs pull` fetches the picture"),
    (rb"\s*<(!doctype|html|head)", "not a picture: a web page; fetch the picture again"),
    (rb"%PDF|%!PS", "not a picture: a PDF or PostScript document"),
    (rb"PK\x03\x04|\x1f\x8b|Rar!|7z\xbc\xaf", "not a picture: an archive; unpack it"),
    (rb"....ftyp|RIFF....AVI |\x1aE\xdf\xa3", "not a picture: a video"),
    (rb"\0{32}", "not a picture: zeros; fetch the picture again"),
    (rb"", "not a picture"),
)
MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")  # in a JPEG; not what stands for a byte 255, not a restart
SPARE = 16  # bytes that libjpeg may read ahead at the end of a JPEG's data
LEFT = 64  # bytes of a JPEG's data that may be left when the picture is complete
EARLY = "truncated: its data ends early"

ImageFile.LOAD_TRUNCATED_IMAGES = False
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
PngImagePlugin.MAX_TEXT_CHUNK = 1 << 24  # bytes of one text or colour profile, unpacked; all together at most 64 MB
warnings.filterwarnings("ignore", module=r"PIL\.")  # damaged EXIF and the like: PictureError says what matters


class PictureError(ValueError):
    """A picture that cannot be used. str(error) is "category" or "category: detail", e.g. "too small: 4x4, ..."."""


def load_picture(path) -> Image.Image:
    """The picture as 8-bit RGB, upright, without metadata. Raises PictureError, and nothing else, if it is unusable.

    path: the path of a file, or the content of a file as bytes. A large JPEG is decoded at a part of its size.
    """
    return read_picture(path, ENOUGH)[0]


def read_picture(path, enough=None) -> tuple[Image.Image, bytes]:
    """The picture and the content of its file. Raises PictureError, as load_picture() does.

    enough: pixels per side that are enough, so that a larger JPEG may be decoded smaller; None: decode all pixels.
    """
    try:
        content = path if isinstance(path, bytes) else read_file(path)
        if not content:
            raise PictureError("empty file")
        return decode(content, enough), content
    except PictureError:
        raise
    except FileNotFoundError:
        raise PictureError("broken link" if os.path.islink(path) else "missing") from None
    except UnidentifiedImageError:
        found = begins_as(content[:1024])
        rare = f"cannot be opened: it begins as {found}, but is damaged or of a rare kind; save it anew as 8-bit RGB"
        raise PictureError(rare if found in FORMATS else found) from None
    except Image.DecompressionBombError:
        raise PictureError(f"too many pixels: more than {MAX_PIXELS:,}") from None
    except OSError as error:
        if error.errno:
            raise PictureError(f"unreadable: {os.strerror(error.errno)}") from None
        early = "truncated" in str(error).lower()
        raise PictureError(EARLY if early else f"damaged: {error}") from None
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise PictureError(f"damaged: {type(error).__name__}: {error}") from None


def read_file(path) -> bytes:
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise PictureError("is a directory")
    if not stat.S_ISREG(status.st_mode):
        raise PictureError("not a regular file")
    if status.st_size > MAX_BYTES:
        raise PictureError(f"too many bytes: {status.st_size:,}, at most {MAX_BYTES:,}")
    if os.path.splitext(path)[1].lower() in RAW:
        raise PictureError(f"raw {TO_JPEG}")
    with open(path, "rb") as file:
        return file.read()


def begins_as(head: bytes) -> str:
    """What SIGNS says of a file with these first bytes."""
    return next(found for sign, found in SIGNS if re.match(sign, head, re.DOTALL | re.IGNORECASE))


def end_of_scan(content: bytes) -> int:
    """Where the data of a JPEG ends that has one scan, as most have; 0 if it has several (progressive).

    Raises PictureError if the end or a scan is missing, or if a scan has zeros that do not stand for a flat area.
    """
    at, missing, tables = 2, {}, {}  # missing: for each component the coefficients (bits) that are not complete yet
    while (found := MARKER.search(content, at)) and found[1] != b"\xd9":
        at = found.end() + int.from_bytes(content[found.end() : found.end() + 2])
        header = content[found.end() + 2 : at]
        if at > len(content):
            raise PictureError(EARLY)
        if found[1] in b"\xc0\xc1\xc2":
            missing, progressive = dict.fromkeys(header[6::3], (1 << 64) - 1), found[1] == b"\xc2"
        while found[1] == b"\xc4" and header:  # Huffman tables: bits of zero in the data are the first symbol
            tables[header[0]], header = header[17], header[17 + sum(header[1:17]) :]
        if found[1] == b"\xda" and missing:
            parts, (low, high, bits) = header[1:-3], header[-3:] if progressive else (0, 63, 0)
            end = MARKER.search(content, at)
            if not end:
                raise PictureError(EARLY)
            # The symbol 0 ends a block, and in a flat area each block. Refined bits and the mean colour may be zeros.
            detail = bits < 16 and (low or not progressive) and any(tables.get(16 | i & 15, 1) for i in parts[1::2])
            stop = at + len(content[at : end.start()].rstrip(b"\0")) if detail else end.start()  # without padding
            if detail and content.find(bytes(64), at, stop) >= 0:
                raise PictureError("damaged: a part of its data is zeros")
            if not progressive and len(parts) == 2 * len(missing):
                return stop
            if bits & 15 == 0:
                missing |= {i: missing[i] & ~((2 << high) - (1 << low)) for i in parts[::2]}
            at = end.start()
    if any(missing.values()):
        raise PictureError(EARLY)
    return 0


def decode(content: bytes, enough=None) -> Image.Image:
    """The upright RGB picture. Raises PictureError, or whatever the decoder raises."""
    stream = io.BytesIO(content)
    with Image.open(stream, formats=FORMATS) as picture:
        width, height = picture.size
        if width * height > MAX_PIXELS:
            raise PictureError(f"too many pixels: {width}x{height}, at most {MAX_PIXELS:,}")
        if min(width, height) < MIN_SIDE:
            raise PictureError(f"too small: {width}x{height}, at least {MIN_SIDE} per side")
        if enough:
            picture.draft(None, (enough, enough))
        end = end_of_scan(content) if picture.format in ("JPEG", "MPO") else 0
        if end:
            # libjpeg takes an end marker for the end of the picture and fills it up with grey. Without the marker it
            # asks for more data, which is an error. And it asks for the last bytes only if it needs them.
            stream.seek(end)
            stream.write(bytes(SPARE))
            stream.truncate()
            picture.decodermaxblock = max(end - LEFT, 1)
        picture.load()
        if end and stream.tell() <= end - LEFT:
            raise PictureError("damaged: its data does not fit its size")
        try:
            turned = picture.getexif().get(0x0112, 1) != 1
            upright = ImageOps.exif_transpose(picture) if turned else picture
        except Exception:  # the EXIF data cannot be read, but the pixels can: they are taken as they are stored
            upright = picture
        # A JPEG no longer needs its file and is not copied; other decoders may keep theirs for the next frame.
        rgb = upright if upright.mode == "RGB" and picture.format == "JPEG" else to_rgb(upright)
        rgb.info = {}  # no orientation that would be applied again, no colour profile
        return rgb


def to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "F" or picture.mode.startswith("I"):
        import numpy as np

        grey = np.nan_to_num(np.asarray(picture).astype(np.float64))
        low, high = float(grey.min()), float(grey.max())
        tops = (1, 255, 65535) if picture.mode == "F" else (255, 65535)
        if picture.mode.startswith("I;16"):
            low, high = 0, 65535
        elif low >= 0 and high <= tops[-1]:
            low, high = 0, next(top for top in tops if high <= top)
        grey = (grey - low) / max(high - low, 1e-9) * 255
        return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def walk(folder, strays: Counter):
    """(path, os.stat_result or None) of every picture file below `folder`, in the order of names.

    These are the files with the extension of a picture, also of a format that is not read, and those without an
    extension that begin like a picture. Links are followed; a folder that was already read (a loop, a second link) is
    not read again. All other files (hidden ones, Thumbs.db, .txt ...) are counted in `strays` by extension. Raises
    OSError if a folder cannot be listed.
    """
    seen = set()

    def entries(path):
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in seen:
            strays["folder linked twice"] += 1
            return []
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(path) as found:
            return sorted(found, key=lambda entry: entry.name, reverse=True)

    stack = entries(folder)  # the next one last
    while stack:
        entry = stack.pop()
        extension = os.path.splitext(entry.name)[1].lower()
        if is_hidden(entry.name):
            strays["hidden"] += 1
        elif extension in (*EXTENSIONS, *UNREAD):
            try:
                yield entry.path, entry.stat()
            except OSError:  # a broken link, a loop of links
                yield entry.path, None
        elif os.path.isdir(entry.path):  # unlike entry.is_dir(), False for a loop of links
            stack += entries(entry.path)
        elif not extension and not begins_as(first_bytes(entry.path)).startswith("not a picture"):
            yield entry.path, entry.stat()
        else:
            strays[(extension if extension.isprintable() else "others") or "no extension"] += 1


def first_bytes(path) -> bytes:
    with suppress(OSError, UserError), open_regular(path) as file:
        return file.read(32)
    return b""


def list_pictures(path) -> list[str]:
    """The picture files below a folder, sorted. A file is a list of itself."""
    return [os.fspath(path)] if os.path.isfile(path) else [found for found, _ in walk(path, Counter())]
