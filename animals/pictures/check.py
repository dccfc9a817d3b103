"""What is learned of every picture before training: the verdict, its size, hashes and thumbnail, on all cores."""

import math
import os
from collections import deque
from typing import NamedTuple

from PIL import Image, ImageOps, ImageStat

from animals.pictures.read import PictureError, _load

BATCH = 32  # pictures a task of the pool


class Facts(NamedTuple):
    """What the check learns of one picture. `reason` is empty if load_picture() takes it, else its PictureError."""

    reason: str
    width: int = 0
    height: int = 0
    sha256: str = ""  # of the file
    pixels: str = ""  # xxh3-128 of size and RGB bytes: equal pictures, whatever the file format
    phash: int = 0  # 64-bit perceptual hash; 0 for a flat picture, which has none
    mirrored: int = 0  # the same of the picture mirrored
    thumbnail: bytes = b""  # 32x32 grey


def inspect(paths) -> list[Facts]:
    """Decode pictures as training will, but whole whatever their size, and describe them."""
    return [inspect_one(path) for path in paths]


def inspect_one(path) -> Facts:
    import xxhash

    try:
        picture, sha = _load(path, digest=True)
    except PictureError as error:
        return Facts(str(error))
    pixels = xxhash.xxh3_128(f"{picture.width}x{picture.height}:".encode())
    pixels.update(picture.tobytes("raw", "RGBX"))  # as it lies in memory; X is 255
    return Facts("", *picture.size, sha.hex(), pixels.hexdigest(), *look(picture))


def look(picture: Image.Image) -> tuple[int, int, bytes]:
    """What look-alikes are found by: perceptual hash, that of the mirrored picture, 32x32 grey thumbnail."""
    thumb = picture.convert("L").resize((32, 32), Image.Resampling.BILINEAR)
    return perceptual_hash(thumb), perceptual_hash(ImageOps.mirror(thumb)), thumb.tobytes()


def perceptual_hash(thumb: Image.Image) -> int:
    """imagehash.phash as a number: 32 of 64 bits are set, so distances are even. 0: too flat to have a shape."""
    import imagehash

    return int(str(imagehash.phash(thumb)), 16) if ImageStat.Stat(thumb).stddev[0] >= 2 else 0


def cores(processes: int) -> int:
    """config.data_processes, where 0 means one a core that this process may use."""
    import joblib

    return processes if processes >= 1 else joblib.cpu_count()


def inspect_all(paths, processes: int):
    """The Facts of each path, in order, decoded by a pool of processes. A picture on which one dies is damaged.

    A dead process ends its pool, and nobody says on which batch it died. So what was under way is asked again one by
    one by a process that does nothing else, and then the pool goes on.
    """
    from joblib.externals.loky import BrokenProcessPool

    processes = min(cores(processes), math.ceil(len(paths) / BATCH))
    done = careful = 0  # paths[done:careful] go one by one
    while done < len(paths):
        alone = done < careful
        stop, how = (careful, (1, 1, 1)) if alone else (len(paths), (processes, BATCH, 4 * processes))
        try:
            for facts in pooled(paths[done:stop], *how):
                done += 1
                yield facts
        except BrokenProcessPool:
            if alone:
                done += 1
                yield Facts("damaged: the decoder crashed")
            else:
                careful = min(done + 4 * processes * BATCH, len(paths))


def pooled(paths, processes: int, batch: int, ahead: int):
    """The Facts of each path, in order; at most `ahead` batches are under way. Raises BrokenProcessPool.

    loky's processes import this module and not __main__: a train.py with CUDA and threads is neither forked nor
    imported again.
    """
    from joblib.externals.loky import ProcessPoolExecutor

    with ProcessPoolExecutor(processes, initializer=hush, env={"OMP_NUM_THREADS": "1"}) as workers:
        running = deque()
        for start in range(0, len(paths), batch):
            running.append(workers.submit(inspect, paths[start : start + batch]))
            if len(running) == ahead:
                yield from running.popleft().result()
        while running:
            yield from running.popleft().result()


def hush() -> None:
    """Decoders print complaints of their own; the verdict says what matters."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
