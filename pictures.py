"""The one way pixels are read: training, validation, test.py and the check of the data all call load_picture().

    from pictures import load_picture
    picture = load_picture("input/train_data/cat/1.jpg")  # PIL, RGB, 8 bit, upright; PictureError if it is unusable

What decides is the content, not the name: a PNG called .jpg is read as PNG. Formats: JPEG, PNG, WebP, BMP, GIF, TIFF.

- Everything is decoded: a truncated file is an error, never half a picture. Of an animation the first frame is read.
- The EXIF orientation is applied. Transparency (alpha or palette) is laid on white. 16-bit, 32-bit and float grey is
  scaled to 8 bit, CMYK, grey, palette and 1-bit become RGB.
- More than config.MAX_PIXELS pixels (a decompression bomb) or a side under config.MIN_SIDE is an error before decoding.
- A JPEG of at least twice 1,008 pixels a side, the longest that the image processor scales any picture to, is decoded
  at a half, a quarter or an eighth of its size: a 4000x3000 one is ready for the model in a third of the time.
- Any aspect ratio is taken: LLaVA-NeXT's image processor scales 8000x10 to 672x1 and the model accepts it.

`python pictures.py` is not for people: it is the worker that Workers starts once a core. Workers are plain
subprocesses, so a train.py with CUDA and threads is never forked or imported again, and a decoder that crashes takes
one worker with it and not the run.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import queue
import signal
import stat
import subprocess
import sys
import warnings
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from config import MAX_BYTES, MAX_PIXELS, MIN_SIDE, UserError

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")  # any case
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # no other decoder is ever run; JPEG's opens MPO too
ENOUGH = 1008  # pixels a side: 3 x 336, the longest side of the largest grid
BATCH = 32  # pictures a message to a worker

ImageFile.LOAD_TRUNCATED_IMAGES = False
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
warnings.filterwarnings("ignore", module=r"PIL\.")  # damaged EXIF and the like: the verdict says what matters


class PictureError(ValueError):
    """A picture that cannot be used. str(error) is "category" or "category: detail", e.g. "truncated"."""


# --- pixels ----------------------------------------------------------------------------------------------------------


def load_picture(path) -> Image.Image:
    """The picture as 8-bit RGB, upright, without metadata. Raises PictureError, and nothing else, if it is unusable."""
    return _load(path, enough=ENOUGH)[0]


def _load(path, digest=False, enough=None) -> tuple[Image.Image, bytes]:
    """The picture and, if asked for, the sha256 of the file."""
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise PictureError("is a directory")
        if not stat.S_ISREG(status.st_mode):
            raise PictureError("not a regular file")
        if status.st_size == 0:
            raise PictureError("empty file")
        if status.st_size > MAX_BYTES:
            raise PictureError(f"too many bytes: {status.st_size:,}, at most {MAX_BYTES:,}")
        with open(path, "rb") as file:
            content = file.read()
        return _decode(io.BytesIO(content), enough), hashlib.sha256(content).digest() if digest else b""
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


def _decode(file, enough=None) -> Image.Image:
    """enough: pixels a side that a JPEG must keep; None for all that it has."""
    with Image.open(file, formats=FORMATS) as picture:
        width, height = picture.size
        if width * height > MAX_PIXELS:
            raise PictureError(f"too many pixels: {width}x{height}, at most {MAX_PIXELS:,}")
        if min(width, height) < MIN_SIDE:
            raise PictureError(f"too small: {width}x{height}, at least {MIN_SIDE} a side")
        if enough:
            picture.draft(None, (enough, enough))
        picture.load()
        try:
            turned = picture.getexif().get(0x0112, 1) != 1
            upright = ImageOps.exif_transpose(picture) if turned else picture
        except Exception:  # unreadable EXIF: the pixels are sound, taken as they lie
            upright = picture
        # A JPEG is done with its file and needs no copy; other decoders may keep theirs for the next frame.
        rgb = upright if upright.mode == "RGB" and picture.format == "JPEG" else _to_rgb(upright)
        rgb.info = {}  # no second rotation, no colour profile to carry around
        return rgb


def _to_rgb(picture: Image.Image) -> Image.Image:
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


# --- folders ---------------------------------------------------------------------------------------------------------


def walk(folder, strays: Counter):
    """(path, os.stat_result or None) of every file with a picture's extension below `folder`, in the order of names.

    Links are followed; a folder that was already read (a loop, a second link) is not read again. Everything else
    (hidden files, Thumbs.db, .txt ...) is counted in `strays` by extension or name. Raises OSError if a folder cannot
    be listed.
    """
    seen = set()

    def entries(path):
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in seen:
            strays["folder linked twice"] += 1
            return iter(())
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(path) as found:
            return iter(sorted(found, key=lambda entry: entry.name))

    stack = [entries(folder)]
    while stack:
        entry = next(stack[-1], None)
        if entry is None:
            stack.pop()
            continue
        extension = os.path.splitext(entry.name)[1].lower()
        if entry.name.startswith("."):
            strays["hidden"] += 1
        elif extension in EXTENSIONS:
            try:
                yield entry.path, entry.stat()
            except OSError:  # a broken link, a loop of links
                yield entry.path, None
        elif _is_folder(entry):
            stack.append(entries(entry.path))
        else:
            strays[extension or entry.name] += 1


def _is_folder(entry) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def list_pictures(path, strays: Counter | None = None) -> list[str]:
    """The picture files below a folder, sorted; other files are counted in `strays`. A file is a list of itself."""
    if os.path.isfile(path):
        return [os.fspath(path)]
    return [found for found, _ in walk(path, Counter() if strays is None else strays)]


# --- image tokens ----------------------------------------------------------------------------------------------------


class Geometry(NamedTuple):
    """What decides how many tokens a picture costs. The defaults are LLaVA-1.6-Mistral-7B's."""

    image_size: int = 336  # side of a tile, pixels
    patch_size: int = 14
    pinpoints: tuple = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))  # (height, width)
    extra_tokens: int = 1  # CLS ...
    strategy: str = "default"  # ... which "default" drops


STOCK = Geometry()


def read_geometry(model_name_or_path) -> Geometry:
    """The geometry of a checkpoint folder, from the files that its processor reads, else the model's config.json.

    Size and pinpoints: processor_config.json's image_processor, else preprocessor_config.json, as transformers does.
    Patch size, extra tokens and strategy: processor_config.json. Stock LLaVA-1.6 values for what no file says, or
    when the folder does not exist yet.
    """

    def read(name):
        path = Path(model_name_or_path) / name
        if not path.is_file():
            return {}
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path}: found {error}; expected JSON; download the file again") from None
        return content if isinstance(content, dict) else {}

    model, processor = read("config.json"), read("processor_config.json")
    images = processor.get("image_processor") or read("preprocessor_config.json")
    vision = model.get("vision_config") or {}
    size = images.get("size") or {}
    size = {"shortest_edge": size} if isinstance(size, int) else size
    side = size.get("shortest_edge") or min(size.get("height", 0), size.get("width", 0))
    pinpoints = images.get("image_grid_pinpoints") or model.get("image_grid_pinpoints") or STOCK.pinpoints
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
    best, most, least_waste = None, 0, math.inf
    for pin_height, pin_width in geometry.pinpoints:
        scale = min(pin_width / width, pin_height / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        waste = pin_height * pin_width - used
        if used > most or (used == most and waste < least_waste):
            best, most, least_waste = (pin_height, pin_width), used, waste
    side = geometry.image_size // geometry.patch_size  # patches a tile side
    rows, columns = side * (best[0] // geometry.image_size), side * (best[1] // geometry.image_size)
    if width / height > columns / rows:
        padding = (rows - int(round(height * (columns / width), 7))) // 2
        rows -= 2 * padding
    else:
        padding = (columns - int(round(width * (rows / height), 7))) // 2
        columns -= 2 * padding
    base = side * side + geometry.extra_tokens - (geometry.strategy == "default")
    return base + rows * columns + rows  # the whole picture, its tiles, one newline a row


# --- inspection on all cores -----------------------------------------------------------------------------------------


class Facts(NamedTuple):
    """What the check learns of one picture. `reason` is empty if load_picture() takes it, else its PictureError."""

    reason: str
    width: int = 0
    height: int = 0
    sha256: str = ""  # of the file
    pixels: str = ""  # xxh3-128 of size and RGB bytes: equal pictures, whatever the file format
    phash: int = 0  # 64-bit perceptual hash; 0 for a flat picture, which has none


def inspect(paths) -> list[Facts]:
    """Decode pictures as training will, but whole whatever their size, and describe them."""
    import xxhash

    found, thumbs = [], []
    for path in paths:
        try:
            picture, sha = _load(path, digest=True)
        except PictureError as error:
            found.append(Facts(str(error)))
            continue
        pixels = xxhash.xxh3_128(f"{picture.width}x{picture.height}:".encode())
        pixels.update(picture.tobytes("raw", "RGBX"))  # as it lies in memory; X is 255
        thumbs.append(thumbnail(picture))
        found.append(Facts("", *picture.size, sha.hex(), pixels.hexdigest()))
    hashes = iter(perceptual_hashes(thumbs))
    return [facts if facts.reason else facts._replace(phash=next(hashes)) for facts in found]


def thumbnail(picture: Image.Image) -> Image.Image:
    """32x32 grey. Of a larger picture every third pixel is enough, in a third of the time: of 660 pictures' copies
    (JPEG 20, 0.4 to 2.2 times the size) fewer than 1 in 200 have a hash more than 4 bits away."""
    if min(picture.size) >= 128:
        picture = picture.resize((picture.width // 3, picture.height // 3), Image.Resampling.NEAREST)
    return picture.convert("L").resize((32, 32), Image.Resampling.BILINEAR)


def perceptual_hashes(thumbs) -> list[int]:
    """The 64-bit DCT hash of 32x32 grey pictures, bit for bit imagehash.phash's, for a batch at once.

    A picture with hardly any contrast has no shape to compare: its hash is 0 and means none.
    """
    if not thumbs:
        return []
    import numpy as np

    grey = np.frombuffer(b"".join(thumb.tobytes() for thumb in thumbs), np.uint8)
    grey = grey.reshape(-1, 32, 32).astype(np.float64)
    basis = np.cos(np.pi / 64 * np.outer(np.arange(8), 2 * np.arange(32) + 1))  # the 8 lowest frequencies, DCT-II
    low = (basis @ grey @ basis.T).reshape(len(thumbs), 64)
    bits = low > np.median(low, axis=1, keepdims=True)
    values = np.packbits(bits, axis=1).view(">u8")[:, 0]
    return [int(value) if flat >= 2 else 0 for value, flat in zip(values, grey.std(axis=(1, 2)), strict=True)]


class Workers:
    """with Workers(processes) as workers: processes that inspect pictures, started when first needed. 0: one a core."""

    def __init__(self, processes: int):
        if processes < 1:
            processes = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.processes = processes

    def __enter__(self):
        self.threads = ThreadPoolExecutor(self.processes)
        self.idle = queue.SimpleQueue()
        for _ in range(self.processes):
            self.idle.put(None)
        return self

    def __exit__(self, *_):
        self.threads.shutdown(cancel_futures=True)
        for _ in range(self.processes):
            _stop(self.idle.get())

    def start(self):
        """Start the processes now, while the caller imports what it needs."""
        for _ in range(self.processes):
            self.idle.put(self.idle.get() or _start_worker())

    def ask(self, paths) -> list[Facts]:
        """The facts of some paths; a picture on which the worker dies is damaged, the others are asked again."""
        worker = self.idle.get()
        try:
            worker = worker or _start_worker()
            answer = _ask(worker, paths)
            if answer is None:
                worker = _stop(worker)
        finally:
            self.idle.put(worker)
        if answer is None:
            crashed = [Facts("damaged: the decoder crashed")]
            return crashed if len(paths) == 1 else [facts for path in paths for facts in self.ask([path])]
        return answer

    def inspect_all(self, items):
        """(key, Facts) for each (key, path, Facts or None), in order; None is asked of the workers.

        Memory does not grow with the number of items.
        """

        def batches():
            batch, unknown = [], 0
            for item in items:
                batch.append(item)
                unknown += item[2] is None
                if unknown == BATCH or len(batch) == 32 * BATCH:
                    yield batch
                    batch, unknown = [], 0
            yield batch

        def finished(batch, future):
            answers = iter(future.result() if future else ())
            return [(key, facts or next(answers)) for key, _, facts in batch]

        pending = deque()
        for batch in batches():
            paths = [path for _, path, facts in batch if facts is None]
            pending.append((batch, self.threads.submit(self.ask, paths) if paths else None))
            if len(pending) > 4 * self.processes:
                yield from finished(*pending.popleft())
        while pending:
            yield from finished(*pending.popleft())


def _start_worker() -> subprocess.Popen:
    # One thread a worker. Freed pictures stay in its heap (glibc): 10 % less CPU than mapping each anew. stderr is
    # dropped because decoders print their own complaints there.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment |= {"MALLOC_MMAP_THRESHOLD_": str(1 << 26), "MALLOC_TRIM_THRESHOLD_": str(1 << 28)}
    return subprocess.Popen(
        [sys.executable, os.path.abspath(__file__)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    )


def _ask(worker, batch) -> list[Facts] | None:
    """The worker's answer, or None if it died."""
    try:
        worker.stdin.write(json.dumps(batch).encode() + b"\n")
        worker.stdin.flush()
        line = worker.stdout.readline()
    except OSError:
        return None
    return [Facts(*facts) for facts in json.loads(line)] if line.endswith(b"\n") else None


def _stop(worker) -> None:
    if worker:
        worker.kill()
        with contextlib.suppress(BrokenPipeError):
            worker.stdin.close()
        worker.stdout.close()
        worker.wait()


def serve():
    """The worker: a JSON list of paths a line on stdin, a JSON list of Facts a line on stdout, until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that a library prints may get into the answers
    for line in sys.stdin.buffer:
        answers.write(json.dumps(inspect(json.loads(line))).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    serve()
