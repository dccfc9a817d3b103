"""The caches of the pictures in temp_dir: what they hold, when they are stale, how they are built.

<split>.checked.arrow  a row each picture file: path, size, times, verdict, width, height, hashes. Depends on the files.
<split>.json, .arrow   a row each usable picture: the conversation and its cost. Depends on wording and geometry too.
<split>.meta.json      what the others were built from; written last, so a half-built cache is no cache
excluded.csv           the unusable pictures of all splits

Every file is written beside its place and renamed. Everything is streamed: memory does not grow with the pictures.
"""

import csv
import hashlib
import io
import json
import os
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import config as settings
from animals.checkpoint.tokens import Geometry, image_token_count
from animals.command import UserError
from animals.files import replacing
from animals.pictures.check import Facts, Workers
from animals.pictures.read import walk
from config import Config

FORMAT = 2  # of everything in temp_dir; a cache of another format is rebuilt
SPLITS = ("train", "validation")
ROWS = 8192  # rows an Arrow batch: what is in memory at once


# --- paths ------------------------------------------------------------------------------------------------------------


def split_folder(config: Config, split: str) -> str:
    return os.path.join(config.input_dir, f"{split}_data")


def temp_path(config: Config, split: str, suffix: str) -> Path:
    return Path(config.temp_dir) / f"{split}.{suffix}"


def class_folders(config: Config, split: str) -> list[str]:
    """The class folders of a split, sorted. Hidden folders and stray files beside them are no classes."""
    with os.scandir(split_folder(config, split)) as found:
        return sorted(e.name for e in found if e.is_dir() and not e.name.startswith("."))


# --- files ------------------------------------------------------------------------------------------------------------


@contextmanager
def csv_file(config: Config, name: str, columns: list[str]):
    """A csv.writer on a file of temp_dir; a name that is no UTF-8 is written with backslashes."""
    with replacing(Path(config.temp_dir) / name) as binary:
        file = io.TextIOWrapper(binary, encoding="utf-8", errors="backslashreplace", newline="", write_through=True)
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(columns)
        yield rows
        file.detach()


def lock(config: Config):
    """with lock(config): one process at a time builds, cuts or undoes."""
    from filelock import FileLock

    try:
        os.makedirs(config.temp_dir, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--temp_dir {config.temp_dir}: found {error.strerror}; expected a folder that can be made"
        ) from None
    return FileLock(os.path.join(config.temp_dir, ".lock"))


# --- freshness --------------------------------------------------------------------------------------------------------


def listing(config: Config, split: str, strays: Counter):
    """(path below the split's folder as bytes, path, size, mtime, ctime) of every picture file, in a fixed order."""
    root = split_folder(config, split)
    for folder in class_folders(config, split):
        if folder not in config.folder_to_label:
            continue
        try:
            for path, status in walk(os.path.join(root, folder), strays):
                times = (status.st_size, status.st_mtime_ns, status.st_ctime_ns) if status else (-1, 0, 0)
                yield os.fsencode(path[len(root) + 1 :]), path, *times
        except OSError as error:
            raise UserError(cannot_list(error, root)) from None


def cannot_list(error: OSError, root: str) -> str:
    return f"{error.filename or root}: found {error.strerror}; expected a folder that can be listed; change its rights"


def is_utf8(path: str) -> bool:
    """False for a file name that no JSON can hold."""
    try:
        path.encode()
        return True
    except UnicodeEncodeError:
        return False


def stamp(config: Config, split: str) -> str:
    """A hash over the listing: it changes when a picture is added, removed, replaced or made readable."""
    digest = hashlib.blake2b(digest_size=16)
    for name, _, *times in listing(config, split, Counter()):
        digest.update(b"%s\0%d %d %d\n" % (name, *times))
    return digest.hexdigest()


def wording(config: Config, geometry: Geometry) -> dict:
    """Everything beside the pictures that the cached rows depend on."""
    return {
        "format": FORMAT,
        "input_dir": config.input_dir,
        "question": config.question,
        "answer": config.answer,
        "folder_to_label": list(config.folder_to_label.items()),
        "geometry": geometry,
    }


def decoder() -> list:
    """What the verdicts depend on beside the files."""
    import PIL

    return [FORMAT, PIL.__version__, settings.MAX_PIXELS, settings.MAX_BYTES, settings.MIN_SIDE]


def identity(path: Path) -> list | None:
    try:
        status = path.stat()
        return [status.st_size, status.st_mtime_ns]
    except OSError:
        return None


def read_meta(config: Config, split: str) -> dict:
    try:
        meta = json.loads(temp_path(config, split, "meta.json").read_text(encoding="utf-8"))
        return meta if isinstance(meta, dict) and meta.get("decoder") == decoder() else {}
    except (OSError, ValueError):
        return {}


def read_summary(config: Config, split: str, geometry: Geometry) -> dict | None:
    """The summary of a fresh cache, or None."""
    meta = read_meta(config, split)
    fresh = (
        meta
        and meta["wording"] == json.loads(json.dumps(wording(config, geometry)))
        and all(identity(temp_path(config, split, suffix)) == meta["files"][suffix] for suffix in meta["files"])
        and meta["stamp"] == stamp(config, split)
    )
    return {**meta["summary"], "built": False} if fresh else None


# --- building ---------------------------------------------------------------------------------------------------------


def checked_schema():
    import pyarrow as pa

    columns = {"path": pa.binary(), "size": pa.int64(), "mtime": pa.int64(), "ctime": pa.int64(), "reason": pa.string()}
    columns |= {"width": pa.int32(), "height": pa.int32(), "sha256": pa.binary(32), "pixels": pa.binary(16)}
    return pa.schema(columns | {"phash": pa.uint64()})


def read_checked(path):
    """The rows of a .checked.arrow file, batch by batch, from the memory map."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as batches:
        yield from batches


def build(config: Config, split: str, geometry: Geometry, workers: Workers) -> dict:
    """Check what is new, then write the rows. Each file is written beside its place and renamed, meta.json last."""
    start = time.perf_counter()
    old = read_meta(config, split)
    checked = temp_path(config, split, "checked.arrow")
    known = checked if old and identity(checked) == old["files"]["checked.arrow"] else None
    strays = Counter()
    now, decoded = check(config, split, known, checked, strays, workers)
    summary = write_rows(config, split, geometry, checked)
    summary["ignored"] = dict(strays)
    summary["decoded"] = decoded
    summary["seconds"] = round(time.perf_counter() - start, 2)
    missing = [folder for folder in config.folder_to_label if folder not in summary["folders"]]
    summary["warnings"] = []
    if missing:
        summary["warnings"].append(
            f"{split_folder(config, split)}: no folder for {', '.join(missing)}; the prompt still offers all labels"
        )
    suffixes = ("checked.arrow", "json", "arrow")
    meta = {
        "decoder": decoder(),
        "wording": wording(config, geometry),
        "stamp": now,
        "files": {suffix: identity(temp_path(config, split, suffix)) for suffix in suffixes},
        "summary": summary,
    }
    with replacing(temp_path(config, split, "meta.json")) as file:
        file.write(json.dumps(meta, indent=1).encode())
    write_excluded(config)
    return {**summary, "built": True}


def check(config: Config, split: str, known, path: Path, strays: Counter, workers: Workers) -> tuple[str, int]:
    """Write `path`, a row for each picture file; decode what `known` does not have. The stamp and the number decoded.

    Old and new listing are in the same order, so they are merged in one pass and neither is held in memory.
    """
    workers.start()
    import pyarrow as pa
    from tqdm import tqdm

    def old_rows():
        for batch in read_checked(known) if known else ():
            yield from zip(*(batch[name].to_pylist() for name in batch.schema.names), strict=True)

    old = old_rows()
    current = next(old, None)
    order = lambda name: name.split(os.sep.encode())  # noqa: E731
    digest = hashlib.blake2b(digest_size=16)
    entries, fresh = [], 0

    def items():
        """(row, path, facts or None) of every picture file."""
        nonlocal current, fresh
        for name, path, *times in listing(config, split, strays):
            digest.update(b"%s\0%d %d %d\n" % (name, *times))
            while current and order(current[0]) < order(name):
                current = next(old, None)
            same = current and current[0] == name and list(current[1:4]) == times and times[0] >= 0
            facts = Facts(*current[4:]) if same else None  # hashes as bytes here, as hex from the workers
            if not is_utf8(path):
                facts = Facts("name is not UTF-8")
            fresh += facts is None
            yield (name, *times), path, facts

    schema = checked_schema()
    os.makedirs(path.parent, exist_ok=True)
    with replacing(path) as file, pa.ipc.new_stream(file, schema) as out:

        def flush():
            columns = zip(*entries, strict=True)
            arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
            out.write_batch(pa.record_batch(arrays, schema=schema))
            entries.clear()

        total = sum(1 for _ in listing(config, split, Counter())) if sys.stderr.isatty() else None
        with tqdm(total=total, desc=f"checking {split}", unit=" pictures", disable=None) as bar:
            for row, facts in workers.inspect_all(items()):
                entries.append((*row, *facts[:3], *map(as_bytes, facts[3:5], (32, 16)), facts.phash))
                bar.update()
                if len(entries) == ROWS:
                    flush()
        if entries:
            flush()
    return digest.hexdigest(), fresh


def as_bytes(value: str | bytes, length: int) -> bytes:
    return value if isinstance(value, bytes) else bytes.fromhex(value).ljust(length, b"\0")


def write_rows(config: Config, split: str, geometry: Geometry, checked: Path) -> dict:
    """Write <split>.json and <split>.arrow from the check, and count."""
    import pyarrow as pa

    part = pa.struct({"type": pa.string(), "text": pa.string()})
    message = pa.struct({"role": pa.string(), "content": pa.list_(part)})
    schema = pa.schema(
        {
            "images": pa.list_(pa.string()),
            "messages": pa.list_(message),
            "label": pa.string(),
            "width": pa.int32(),
            "height": pa.int32(),
            "image_tokens": pa.int32(),
            "sha256": pa.string(),
        }
    )
    chats = pa.array([config.conversation(label) for label in config.labels], schema.field("messages").type)
    chat_json = {  # the part of a line that depends on the label alone
        label: f'"messages": {json.dumps(config.conversation(label), ensure_ascii=False)}, '
        f'"label": {json.dumps(label, ensure_ascii=False)}'
        for label in config.labels
    }
    index = {label: i for i, label in enumerate(config.labels)}
    folders = dict.fromkeys((f for f in class_folders(config, split) if f in config.folder_to_label), 0)
    excluded, classes = Counter(), dict.fromkeys(config.labels, 0)
    tokens = {"min": 0, "mean": 0, "max": 0}
    digest = hashlib.sha256(json.dumps([config.question, config.answer]).encode())
    known_sizes, total, n = {}, 0, 0
    root = split_folder(config, split)
    with (
        replacing(temp_path(config, split, "json")) as text,
        replacing(temp_path(config, split, "arrow")) as binary,
        pa.ipc.new_stream(binary, schema) as out,
    ):
        text.write(b"[")
        for batch in read_checked(checked):
            rows = []
            names = ("path", "reason", "width", "height", "sha256")
            for name, reason, width, height, sha in zip(*(batch[c].to_pylist() for c in names), strict=True):
                if reason:
                    excluded[reason.partition(":")[0]] += 1
                    continue
                name, sha = name.decode(), sha.hex()
                folder = name.partition(os.sep)[0]
                label = config.folder_to_label[folder]
                if (width, height) not in known_sizes:
                    if len(known_sizes) > 100_000:
                        known_sizes.clear()
                    known_sizes[width, height] = image_token_count(width, height, geometry)
                cost = known_sizes[width, height]
                path = os.path.join(root, name)
                rows.append((path, label, width, height, cost, sha))
                folders[folder] += 1
                classes[label] += 1
                digest.update(f"{name}\0{sha}\0{label}\n".encode())
                line = (
                    f'{{"images": [{json.dumps(path, ensure_ascii=False)}], {chat_json[label]}, "width": {width}, '
                    f'"height": {height}, "image_tokens": {cost}, "sha256": "{sha}"}}'
                )
                text.write(f"{',' if n else ''}\n{line}".encode())
                n += 1
                total += cost
                tokens["min"] = min(tokens["min"] or cost, cost)
                tokens["max"] = max(tokens["max"], cost)
            if rows:
                paths, labels, *rest = zip(*rows, strict=True)
                arrays = [
                    pa.ListArray.from_arrays(range(len(rows) + 1), pa.array(paths)),
                    chats.take(pa.array([index[label] for label in labels])),
                    pa.array(labels),
                    *(pa.array(c, f.type) for c, f in zip(rest, list(schema)[3:], strict=True)),
                ]
                out.write_batch(pa.record_batch(arrays, schema=schema))
        text.write(b"\n]\n")
    tokens["mean"] = round(total / n, 1) if n else 0
    return {
        "n": n,
        "classes": classes,
        "folders": folders,
        "excluded": dict(excluded),
        "image_tokens": tokens,
        "fingerprint": digest.hexdigest()[:32],
    }


def write_excluded(config: Config) -> None:
    """excluded.csv of all splits that were checked."""
    with csv_file(config, "excluded.csv", ["image", "split", "reason"]) as rows:
        for split in SPLITS:
            checked = temp_path(config, split, "checked.arrow")
            for batch in read_checked(checked) if checked.is_file() else ():
                for name, reason in zip(batch["path"].to_pylist(), batch["reason"].to_pylist(), strict=True):
                    if reason:
                        rows.writerow([os.path.join(split_folder(config, split), os.fsdecode(name)), split, reason])
