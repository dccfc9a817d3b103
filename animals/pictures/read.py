"""The one way pixels are read, by load_picture(): in training, validation, test.py and the check of the pictures.

    from animals.pictures.read import load_picture
    picture = load_picture("input/train_data/cat/1.jpg")  # PIL, RGB, 8 bit, upright; PictureError if it is unusable

The content decides and not the name: a PNG called .jpg is read as PNG. Formats: JPEG, PNG, WebP, AVIF, BMP, GIF, TIFF.
To take another one, add it to EXTENSIONS and FORMATS below, and register its plugin here if Pillow cannot decode it.

- The complete file is decoded: a truncated file is an error, never half a picture. Of an animation the first frame is
  read.
- The EXIF orientation is applied. Transparency (alpha or palette) is laid on white. Grey of 16 bit, 32 bit or float is
  scaled to 8 bit. CMYK, grey, palette and 1-bit pictures become RGB.
- More than config.MAX_PIXELS pixels (a decompression bomb) or a side under config.MIN_SIDE is an error before decoding.
- A JPEG whose sides are at least twice 1,008 pixels, the longest side to which the image processor scales any picture,
  is decoded at a half, a quarter or an eighth of its size: 4000x3000 pixels are ready in a third of the time.
- Any aspect ratio is taken: LLaVA-NeXT's image processor scales 8000x10 to 672x1, and the model accepts it.
"""

import io
import os
import stat
import warnings
from collections import Counter

from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from animals.files import is_hidden
from config import MAX_BYTES, MAX_PIXELS, MIN_SIDE

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")  # any case
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF")  # no other decoder is ever run; JPEG's opens MPO too
ENOUGH = 1008  # pixels per side: 3 x 336, the longest side of the largest grid of tiles

ImageFile.LOAD_TRUNCATED_IMAGES = False
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
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
        raise PictureError("not a picture") from None
    except Image.DecompressionBombError:
        raise PictureError(f"too many pixels: more than {MAX_PIXELS:,}") from None
    except OSError as error:
        if error.errno:
            raise PictureError(f"unreadable: {os.strerror(error.errno)}") from None
        kind = "truncated" if "truncated" in str(error).lower() else "damaged"
        raise PictureError(f"{kind}: {error}") from None
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
    with open(path, "rb") as file:
        return file.read()


def decode(content: bytes, enough=None) -> Image.Image:
    """The upright RGB picture. Raises PictureError, or whatever the decoder raises."""
    with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
        width, height = picture.size
        if width * height > MAX_PIXELS:
            raise PictureError(f"too many pixels: {width}x{height}, at most {MAX_PIXELS:,}")
        if min(width, height) < MIN_SIDE:
            raise PictureError(f"too small: {width}x{height}, at least {MIN_SIDE} per side")
        if enough:
            picture.draft(None, (enough, enough))
        picture.load()
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
    """(path, os.stat_result or None) of every file with a picture's extension below `folder`, in the order of names.

    Links are followed; a folder that was already read (a loop, a second link) is not read again. All other files
    (hidden ones, Thumbs.db, .txt ...) are counted in `strays` by extension or name. Raises OSError if a folder cannot
    be listed.
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
        elif extension in EXTENSIONS:
            try:
                yield entry.path, entry.stat()
            except OSError:  # a broken link, a loop of links
                yield entry.path, None
        elif os.path.isdir(entry.path):  # unlike entry.is_dir(), False for a loop of links
            stack += entries(entry.path)
        else:
            strays[extension or entry.name] += 1


def list_pictures(path) -> list[str]:
    """The picture files below a folder, sorted. A file is a list of itself."""
    return [os.fspath(path)] if os.path.isfile(path) else [found for found, _ in walk(path, Counter())]
