"""What is learned of every picture before training: the verdict, its size and hashes, on all cores.

The workers are plain subprocesses, so a train.py with CUDA and threads is never forked or imported again, and a decoder
that crashes takes one worker with it and not the run.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from PIL import Image

from animals.pictures.read import PictureError, _load

BATCH = 32  # pictures a message to a worker


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
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment |= {"MALLOC_MMAP_THRESHOLD_": str(1 << 26), "MALLOC_TRIM_THRESHOLD_": str(1 << 28)}
    return subprocess.Popen(
        [sys.executable, "-m", "animals.pictures.check"],
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
