"""What is learned of every picture before training, on all cores: is it usable, its size and its hashes."""

import base64
import hashlib
import math
import os
from typing import NamedTuple

from PIL import Image, ImageOps, ImageStat

from animals.files import printable
from animals.pictures.read import PictureError, read_picture

BATCH = 32  # pictures per task of the process pool


class Facts(NamedTuple):
    """What the check learns of one picture; all but `reason` go into a row of the JSON as they are."""

    reason: str  # empty if the picture is used, else why not: mostly the text of load_picture()'s PictureError
    width: int = 0
    height: int = 0
    sha256: str = ""  # of the file
    pixels: str = ""  # xxh3-128 of size and RGB bytes: equal pictures have equal ones, whatever the file format
    phash: str = ""  # 64-bit perceptual hash in hex; zero for a flat picture, which has none
    mirrored: str = ""  # the same of the mirrored picture
    thumbnail: str = ""  # 32x32 grey bytes in base64


def inspect(path) -> Facts:
    """Decode a picture as training will, but all pixels of a large one too, and describe it."""
    import xxhash

    try:
        os.fspath(path).encode()  # no JSON can hold another name
        if printable(os.fspath(path)) != os.fspath(path):
            return Facts("name has control characters")
        picture, content = read_picture(path)
    except UnicodeEncodeError:
        return Facts("name is not UTF-8")
    except PictureError as error:
        return Facts(str(error))
    pixels = xxhash.xxh3_128(f"{picture.width}x{picture.height}:".encode())
    pixels.update(picture.tobytes("raw", "RGBX"))  # the layout in memory; X is 255
    phash, mirrored, thumbnail = fingerprint(picture)
    hashes = hashlib.sha256(content).hexdigest(), pixels.hexdigest(), f"{phash:016x}", f"{mirrored:016x}"
    return Facts("", *picture.size, *hashes, base64.b64encode(thumbnail).decode())


def fingerprint(picture: Image.Image) -> tuple[int, int, bytes]:
    """What near-duplicates are found by: perceptual hash, hash of the mirrored picture, 32x32 grey thumbnail."""
    thumbnail = picture.convert("L").resize((32, 32), Image.Resampling.BILINEAR)
    return perceptual_hash(thumbnail), perceptual_hash(ImageOps.mirror(thumbnail)), thumbnail.tobytes()


def perceptual_hash(thumbnail: Image.Image) -> int:
    """imagehash.phash as a number. Always 32 of 64 bits are set, so two differ in an even number of bits.

    0 means that the picture is too flat to have a shape.
    """
    import imagehash

    return int(str(imagehash.phash(thumbnail)), 16) if ImageStat.Stat(thumbnail).stddev[0] >= 2 else 0


def cores(processes: int) -> int:
    """config.data_processes, where 0 means one process per core that this process may use."""
    import joblib

    return processes if processes >= 1 else joblib.cpu_count()


def inspect_all(paths, processes: int):
    """The Facts of each path, in order, from a pool of processes. A picture that crashes the decoder is damaged.

    A dead process ends its pool, and which batch it was working on is not known. So the batches that were under way
    are checked again picture by picture in a process of their own, and then the pool goes on. loky's processes import
    this module and not __main__: a train.py with CUDA and threads is neither forked nor imported again.
    """
    from joblib.externals.loky import BrokenProcessPool, ProcessPoolExecutor

    processes = min(cores(processes), math.ceil(len(paths) / BATCH))
    done = careful = 0  # paths[done:careful] are checked one by one
    while done < len(paths):
        alone = done < careful
        n, batch, part = (1, 1, paths[done:careful]) if alone else (processes, BATCH, paths[done:])
        try:
            with ProcessPoolExecutor(n, initializer=silence, env={"OMP_NUM_THREADS": "1"}) as workers:
                for facts in workers.map(inspect, part, chunksize=batch):
                    done += 1
                    yield facts
        except BrokenProcessPool:
            if alone:
                done += 1
                yield Facts("damaged: the decoder crashed")
            else:
                careful = min(done + 4 * processes * BATCH, len(paths))


def silence() -> None:
    """Close stderr of a worker: decoders print complaints of their own, and `reason` says what matters."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
