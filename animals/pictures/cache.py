"""The caches of the pictures in temp_dir: what they hold, when they are stale, how they are built.

<split>.checked.parquet  a row each picture file: path, size, times and what check.py learned. Depends on the files
<split>.json             a row each usable picture: its conversation and cost. Depends on wording and geometry too
<split>.meta.json        what the others were built from; written last, so a half-built cache is no cache
<split>.rows/            datasets' memory-mapped copy of the JSON, made by load_split(), removed with every new JSON
excluded.csv             the unusable pictures of all splits

Every file is written beside its place and renamed.
"""

import csv
import functools
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import config as settings
from animals.checkpoint.tokens import Geometry, image_token_count
from animals.command import UserError
from animals.files import replacing, subfolders
from animals.pictures.check import Facts, inspect_all
from animals.pictures.read import FORMATS, walk
from config import Config

FORMAT = 3  # of everything in temp_dir; a cache of another format is rebuilt
SPLITS = ("train", "validation")
KEY = ("path", "size", "mtime", "ctime")  # of a picture file; with the fields of Facts the columns of the check


# --- paths ------------------------------------------------------------------------------------------------------------


def split_folder(config: Config, split: str) -> str:
    return os.path.join(config.input_dir, f"{split}_data")


def temp_path(config: Config, split: str, suffix: str) -> Path:
    return Path(config.temp_dir) / f"{split}.{suffix}"


# --- files ------------------------------------------------------------------------------------------------------------


@contextmanager
def csv_file(config: Config, name: str, columns: list[str]):
    """A csv.writer on a file of temp_dir; a name that is no UTF-8 is written with backslashes."""
    with replacing(Path(config.temp_dir) / name, errors="backslashreplace", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(columns)
        yield rows


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
    """(path below the split's folder as bytes, size, mtime, ctime) of every picture file, in a fixed order."""
    root = split_folder(config, split)
    for folder in subfolders(split_folder(config, split)):
        if folder not in config.folder_to_label:
            continue
        try:
            for path, status in walk(os.path.join(root, folder), strays):
                times = (status.st_size, status.st_mtime_ns, status.st_ctime_ns) if status else (-1, 0, 0)
                yield os.fsencode(path[len(root) + 1 :]), *times
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


def stamp(files) -> str:
    """A hash over a listing: it changes when a picture is added, removed, replaced or made readable."""
    digest = hashlib.blake2b(digest_size=16)
    for name, *times in files:
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

    return [FORMAT, PIL.__version__, list(FORMATS), settings.MAX_PIXELS, settings.MAX_BYTES, settings.MIN_SIDE]


def identity(path: Path) -> list | None:
    try:
        status = path.stat()
        return [status.st_size, status.st_mtime_ns]
    except OSError:
        return None


def read_meta(config: Config, split: str) -> dict:
    """What the cache of a split was built from; {} if there is none, or its check is not whole or of other rules."""
    try:
        meta = json.loads(temp_path(config, split, "meta.json").read_text(encoding="utf-8"))
        whole = identity(temp_path(config, split, "checked.parquet")) == meta["files"]["checked.parquet"]
        return meta if whole and meta["decoder"] == decoder() else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def fresh_meta(config: Config, split: str) -> dict:
    """read_meta() if the pictures are still those that were checked, else {}."""
    meta = read_meta(config, split)
    there = meta and os.path.isdir(split_folder(config, split))
    return meta if there and meta["stamp"] == stamp(listing(config, split, Counter())) else {}


def fresh_summary(config: Config, split: str, geometry: Geometry, meta: dict) -> dict | None:
    """The summary of a split whose fresh_meta() this is, or None if its rows have to be written anew."""
    fresh = (
        meta
        and meta["wording"] == json.loads(json.dumps(wording(config, geometry)))
        and identity(temp_path(config, split, "json")) == meta["files"]["json"]
    )
    return {**meta["summary"], "built": False} if fresh else None


# --- building ---------------------------------------------------------------------------------------------------------


def build(config: Config, split: str, geometry: Geometry) -> dict:
    """Check what is new, then write the rows. Each file is written beside its place and renamed, meta.json last.

    Returns the content of meta.json, whose summary is prepare()'s."""
    start = time.perf_counter()
    strays = Counter()
    files = list(listing(config, split, strays))
    rows, decoded = check(config, split, files)
    summary = write_rows(config, split, geometry, rows)
    summary["ignored"] = dict(strays)
    summary["decoded"] = decoded
    summary["seconds"] = round(time.perf_counter() - start, 2)
    missing = [folder for folder in config.folder_to_label if folder not in summary["folders"]]
    line = f"{split_folder(config, split)}: no folder for {', '.join(missing)}; the prompt still offers all labels"
    summary["warnings"] = [line] if missing else []
    meta = {
        "decoder": decoder(),
        "wording": wording(config, geometry),
        "stamp": stamp(files),
        "files": {suffix: identity(temp_path(config, split, suffix)) for suffix in ("checked.parquet", "json")},
        "summary": summary,
    }
    with replacing(temp_path(config, split, "meta.json")) as file:
        json.dump(meta, file, indent=1)  # in ASCII: a stray file's name may be no UTF-8
    write_excluded(config)
    return meta


def check(config: Config, split: str, files: list[tuple]) -> tuple[list[dict], int]:
    """The rows of the check, a dict each file of the listing, written to <split>.checked.parquet; how many are new."""
    import pyarrow as pa
    import pyarrow.parquet as parquet
    from tqdm import tqdm

    known = {}
    if read_meta(config, split):
        known = {tuple(row[column] for column in KEY): row for row in read_checked(config, split)}
    root = split_folder(config, split)
    paths = {file: os.path.join(root, os.fsdecode(file[0])) for file in files}
    new = [file for file in files if file not in known and is_utf8(paths[file])]
    facts = inspect_all([paths[file] for file in new], config.data_processes)
    facts = tqdm(facts, f"checking {split}", len(new), unit=" pictures", disable=None)
    found = dict(zip(new, facts, strict=True))
    rows = [
        known.get(file) or dict(zip(KEY, file, strict=True)) | found.get(file, NOT_UTF8)._asdict() for file in files
    ]
    columns = {"path": pa.binary(), "size": pa.int64(), "mtime": pa.int64(), "ctime": pa.int64(), "reason": pa.string()}
    columns |= {"width": pa.int32(), "height": pa.int32(), "sha256": pa.string(), "pixels": pa.string()}
    columns |= {"phash": pa.uint64(), "mirrored": pa.uint64(), "thumbnail": pa.binary()}
    os.makedirs(config.temp_dir, exist_ok=True)
    with replacing(temp_path(config, split, "checked.parquet"), "wb") as out:
        parquet.write_table(pa.Table.from_pylist(rows, pa.schema(columns)), out)
    return rows, len(new)


NOT_UTF8 = Facts("name is not UTF-8")


def read_checked(config: Config, split: str, columns: list[str] | None = None) -> list[dict]:
    """The rows of the last check."""
    import pyarrow.parquet as parquet

    return parquet.read_table(temp_path(config, split, "checked.parquet"), columns=columns).to_pylist()


def write_rows(config: Config, split: str, geometry: Geometry, rows: list[dict]) -> dict:
    """Write <split>.json from the check, a picture a line, and count."""
    folders = dict.fromkeys((f for f in subfolders(split_folder(config, split)) if f in config.folder_to_label), 0)
    excluded, classes, tokens = Counter(), dict.fromkeys(config.labels, 0), []
    digest = hashlib.sha256(json.dumps([config.question, config.answer]).encode())
    count = functools.cache(lambda width, height: image_token_count(width, height, geometry))
    root = split_folder(config, split)
    with replacing(temp_path(config, split, "json")) as text:
        for row in rows:
            if row["reason"]:
                excluded[row["reason"].partition(":")[0]] += 1
                continue
            name = row["path"].decode()
            folder = name.partition(os.sep)[0]
            label = config.folder_to_label[folder]
            line = {
                "images": [os.path.join(root, name)],
                "messages": config.conversation(label),
                "label": label,
                "width": row["width"],
                "height": row["height"],
                "image_tokens": count(row["width"], row["height"]),
                "sha256": row["sha256"],
            }
            text.write((",\n" if tokens else "[\n") + json.dumps(line, ensure_ascii=False))
            folders[folder] += 1
            classes[label] += 1
            tokens.append(line["image_tokens"])
            digest.update(f"{name}\0{row['sha256']}\0{label}\n".encode())
        text.write("\n]\n" if tokens else "[]\n")
    shutil.rmtree(temp_path(config, split, "rows"), ignore_errors=True)  # of the JSON that was there before
    tokens = tokens or [0]
    return {
        "n": sum(classes.values()),
        "classes": classes,
        "folders": folders,
        "excluded": dict(excluded),
        "image_tokens": {"min": min(tokens), "mean": round(sum(tokens) / len(tokens), 1), "max": max(tokens)},
        "fingerprint": digest.hexdigest()[:32],
    }


def load_split(config: Config, split: str):
    """The cached split as a datasets.Dataset, memory-mapped. Call prepare() first.

    Columns: images [path], messages [{role, content: [{type, text}]}], label, width, height, image_tokens, sha256.
    """
    path, copy = temp_path(config, split, "json"), os.path.abspath(temp_path(config, split, "rows"))
    if not path.is_file():
        raise UserError(f"{path}: not found; expected the cache of {split}; run python data_process_utils.py")
    os.environ.setdefault("HF_DATASETS_CACHE", copy)
    from datasets import Features, List, Value, load_dataset

    string, number = Value("string"), Value("int32")
    part = {"type": string, "text": string}  # one type for all parts: the picture's has the text None
    features = {"images": List(string), "messages": List({"role": string, "content": List(part)}), "label": string}
    features |= {"width": number, "height": number, "image_tokens": number, "sha256": string}
    return load_dataset("json", data_files=str(path), split="train", features=Features(features), cache_dir=copy)


def write_excluded(config: Config) -> None:
    """excluded.csv of all splits that were checked."""
    with csv_file(config, "excluded.csv", ["image", "split", "reason"]) as out:
        for split in SPLITS:
            for row in read_checked(config, split, ["path", "reason"]) if read_meta(config, split) else ():
                if row["reason"]:
                    path = os.path.join(split_folder(config, split), os.fsdecode(row["path"]))
                    out.writerow([path, split, row["reason"]])
