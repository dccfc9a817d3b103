"""The caches of the pictures in temp_dir: what they hold, when they are out of date, how they are built.

<split>.json   one row per usable picture: its conversation, size, image tokens and hashes (Facts in inspection.py)
cache.json     for each split what its JSON was built from, its summary and the unusable pictures; the duplicates
               (duplicates.py). It is written last, so a half-built cache counts as no cache
<split>.rows/  the memory-mapped copy of the JSON, made by Hugging Face datasets, removed with every new JSON
excluded.csv   the unusable pictures of both splits, their names as printable() gives them

Every file is written under another name and renamed. Pillow is imported late: launch.py runs before `pip install`.
"""

import functools
import hashlib
import json
import os
import shutil
import sys
import time
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import config as settings
from animals.checkpoint.image_tokens import Geometry, image_token_count
from animals.command import UserError
from animals.files import folder_lock, printable, replacing, require_writable, subfolders, write_csv_rows
from config import Config

FORMAT = 7  # of everything in temp_dir; a cache of another format is rebuilt
SPLITS = ("train", "validation")
HASHES = ("pixels", "phash", "mirrored", "thumbnail")  # columns of the JSON by which duplicates are found
COLUMNS = ("images", "messages", "label", "width", "height", "image_tokens", "sha256", *HASHES)


def split_folder(config: Config, split: str) -> str:
    return os.path.join(config.input_dir, f"{split}_data")


def temp_path(config: Config, name: str) -> Path:
    return Path(config.temp_dir) / name


@contextmanager
def csv_file(config: Config, name: str, columns: list[str]):
    """Yields a function that writes rows to a CSV of temp_dir."""
    with replacing(temp_path(config, name), newline="") as file:
        write_csv_rows(file, [columns])
        yield functools.partial(write_csv_rows, file)


@contextmanager
def lock(config: Config, moving: bool = False):
    """with lock(config): no other process uses temp_dir meanwhile, and none moves pictures of input_dir.

    moving: this process moves pictures; then no other one builds or reads a cache of input_dir, whatever its temp_dir.
    The lock of input_dir comes first, so that no two processes wait for each other. May be nested, but not with
    `moving`. Raises UserError if input_dir cannot be listed, or temp_dir (with `moving` also input_dir) not written to.
    """
    from filelock import FileLock, Timeout

    if moving:
        require_writable("--input_dir", config.input_dir)
    require_writable("--temp_dir", config.temp_dir)
    if "::" in os.path.abspath(config.temp_dir):
        raise UserError(f"--temp_dir {config.temp_dir}: found :: in its path; expected none; name another folder")
    try:
        os.listdir(config.input_dir)
    except OSError as error:
        raise UserError(cannot_list(error, config.input_dir)) from None
    with folder_lock(config.input_dir, shared=not moving):
        os.makedirs(config.temp_dir, exist_ok=True)
        file = FileLock(temp_path(config, ".lock"), is_singleton=True)
        try:
            held = file.acquire(blocking=False)
        except Timeout:
            if "RANK" not in os.environ:  # the ranks of one run take turns, which is no news
                print(f"waiting: another command uses {config.temp_dir}", file=sys.stderr, flush=True)
            held = file.acquire()
        with held:
            yield


def listing(config: Config, split: str) -> tuple[list[str], Counter, str]:
    """The picture files of the class folders, in a fixed order; the other files, counted; a hash of names and times.

    The hash changes when a picture is added, removed, replaced or made readable.
    """
    from animals.pictures.read import walk

    root, paths, strays = split_folder(config, split), [], Counter()
    digest = hashlib.blake2b(digest_size=16)
    try:
        for folder in subfolders(root):
            for path, status in walk(os.path.join(root, folder), strays) if folder in config.folder_to_label else ():
                times = (status.st_size, status.st_mtime_ns, status.st_ctime_ns) if status else (-1, 0, 0)
                digest.update(b"%s\0%d %d %d\n" % (os.fsencode(path), *times))
                paths.append(path)
    except OSError as error:
        raise UserError(cannot_list(error, root)) from None
    return paths, strays, digest.hexdigest()


def cannot_list(error: OSError, root: str) -> str:
    place = printable(error.filename or root)
    return f"{place}: found {error.strerror}; expected a folder that can be listed; change its rights, or name another"


def rules() -> str:
    """What the verdicts of the check depend on beside the files."""
    import PIL

    from animals.pictures.read import FORMATS

    return json.dumps([FORMAT, PIL.__version__, FORMATS, settings.MAX_PIXELS, settings.MAX_BYTES, settings.MIN_SIDE])


def row_settings(config: Config, split: str, geometry: Geometry) -> dict:
    """What the rows depend on beside the files and the rules, as JSON gives it back."""
    values = {"pictures": split_folder(config, split), "question": config.question, "answer": config.answer}
    values |= {"folder_to_label": list(config.folder_to_label.items()), "geometry": geometry}
    return json.loads(json.dumps(values))


def size_and_time(path: Path) -> list | None:
    """Size and time of a file; None if there is none."""
    return [path.stat().st_size, path.stat().st_mtime_ns] if path.exists() else None


def read_cache(config: Config) -> dict:
    """cache.json, whether its entries are up to date or not; without entries if there is none by today's rules."""
    with suppress(OSError, ValueError, TypeError, KeyError):  # none there, no JSON, other JSON
        found = json.loads(temp_path(config, "cache.json").read_text(encoding="utf-8"))
        if found["rules"] == rules():
            return found
    return {"rules": rules()}


def write_cache(config: Config, content: dict) -> None:
    with replacing(temp_path(config, "cache.json")) as file:
        json.dump(content, file, indent=1)


def fresh_entries(config: Config, cache: dict) -> dict[str, dict]:
    """The entries of those splits whose pictures and JSON are still the ones that the check left."""
    there = [split for split in SPLITS if split in cache and os.path.isdir(split_folder(config, split))]
    same = [split for split in there if cache[split]["json"] == size_and_time(temp_path(config, f"{split}.json"))]
    return {split: cache[split] for split in same if cache[split]["stamp"] == listing(config, split)[2]}


def checked_entry(config: Config, split: str, summary: dict | None = None) -> dict:
    """The entry of a split whose JSON is to be read. Call it under lock().

    summary: what prepare() has returned for the split, if that is to be the same still. Raises UserError if the cache
    is not that of today's pictures and of this run's settings, because another command has the same temp_dir.
    """
    entry, path = read_cache(config).get(split), temp_path(config, f"{split}.json")
    if not entry or entry["json"] != size_and_time(path):
        raise UserError(f"{path}: found no complete cache of {split}; expected one; run python data_process_utils.py")
    own = row_settings(config, split, entry["settings"]["geometry"])
    wrong = [f"the {k} {v!r}; expected {own[k]!r}" for k, v in entry["settings"].items() if v != own[k]]
    if entry["stamp"] != listing(config, split)[2]:
        wrong.append(f"other files; expected those of today in {own['pictures']}")
    if summary and entry["json"] != summary["json"]:
        wrong.append("a cache that was built after this command's check; expected the one that was checked")
    if wrong:
        why = "another command has the same --temp_dir, or pictures were changed meanwhile"
        how = "give each --input_dir a --temp_dir of its own, and start again"
        raise UserError(f"{path}: found {wrong[0]}; {why}: {how}")
    return entry


def refresh(config: Config, splits, geometry: Geometry) -> dict[str, dict]:
    """Build the caches of `splits` that are out of date. Call it under lock().

    Returns the entries of all splits that are up to date then; `built` is in those that this call has written.
    """
    cache = read_cache(config)
    entries = fresh_entries(config, cache)
    for split in splits:
        entry, listed = entries.get(split), temp_path(config, "excluded.csv").exists()
        if entry and entry["settings"] == row_settings(config, split, geometry) and listed:
            continue
        cache[split] = build(config, split, geometry, entry)
        with csv_file(config, "excluded.csv", ["image", "split", "reason"]) as out:
            for part in filter(cache.get, SPLITS):
                out((path, part, reason) for path, reason in cache[part]["excluded"])
        write_cache(config, cache)
        entries[split] = cache[split] | {"built": True}
    return entries


def build(config: Config, split: str, geometry: Geometry, entry: dict | None) -> dict:
    """Write <split>.json and return its entry for cache.json.

    entry: the present one, if only words, labels or geometry have changed: nothing is decoded then. None: decode all.
    """
    start = time.perf_counter()
    rows, entry = (read_rows(config, split), entry | {"decoded": 0}) if entry else decode(config, split)
    summary = write_rows(config, split, geometry, rows) | {name: entry[name] for name in ("ignored", "decoded")}
    summary["excluded"] = Counter(reason.partition(":")[0] for _, reason in entry["excluded"])
    missing = [folder for folder in config.folder_to_label if folder not in summary["folders"]]
    line = f"{split_folder(config, split)}: no folder for {', '.join(missing)}; the prompt still offers all labels"
    summary |= {"warnings": [line] if missing else [], "seconds": round(time.perf_counter() - start, 2)}
    values, written = row_settings(config, split, geometry), size_and_time(temp_path(config, f"{split}.json"))
    return entry | {"summary": summary, "settings": values, "json": written}


def decode(config: Config, split: str) -> tuple[list[dict], dict]:
    """Rows with path, size and hashes of each usable picture; what the entry says of all files."""
    from tqdm import tqdm

    from animals.pictures.inspection import inspect_all

    paths, ignored, stamp = listing(config, split)
    rows, excluded = [], []
    facts = inspect_all(paths, config.data_processes)
    bar = tqdm(facts, f"decoding {split}_data (once, until a file changes)", len(paths), unit=" pictures", disable=None)
    for path, found in zip(paths, bar, strict=True):
        if found.reason:
            excluded.append((printable(path), found.reason))
        else:
            rows.append({"images": [path], **found._asdict()})
    return rows, {"stamp": stamp, "ignored": ignored, "excluded": excluded, "decoded": len(paths)}


def read_rows(config: Config, split: str):
    """Yield the rows of <split>.json: it holds one per line."""
    with open(temp_path(config, f"{split}.json"), encoding="utf-8") as file:
        yield from (json.loads(line.rstrip(",\n")) for line in file if line.startswith("{"))


def write_rows(config: Config, split: str, geometry: Geometry, rows) -> dict:
    """Write <split>.json from rows with path, size and hashes; return what is counted of them for the summary."""
    root = split_folder(config, split)
    folders = dict.fromkeys((f for f in subfolders(root) if f in config.folder_to_label), 0)
    classes, tokens = dict.fromkeys(config.labels, 0), []
    digest = hashlib.sha256(json.dumps([config.question, config.answer]).encode())
    count = functools.cache(lambda width, height: image_token_count(width, height, geometry))
    with replacing(temp_path(config, f"{split}.json")) as text:
        text.write("[")
        for row in rows:
            name = os.path.relpath(row["images"][0], root)
            folder = name.partition(os.sep)[0]
            label = config.folder_to_label[folder]
            text.write(",\n" if tokens else "\n")
            tokens.append(count(row["width"], row["height"]))
            row |= {"messages": config.conversation(label), "label": label, "image_tokens": tokens[-1]}
            text.write(json.dumps({column: row[column] for column in COLUMNS}, ensure_ascii=False))
            folders[folder] += 1
            classes[label] += 1
            digest.update(f"{name}\0{row['sha256']}\0{label}\n".encode())
        text.write("\n]\n")
    shutil.rmtree(temp_path(config, f"{split}.rows"), ignore_errors=True)  # of the JSON that was there before
    n, tokens = len(tokens), tokens or [0]
    image_tokens = {"min": min(tokens), "mean": round(sum(tokens) / len(tokens), 1), "max": max(tokens)}
    counted = {"n": n, "classes": classes, "folders": folders, "image_tokens": image_tokens}
    return counted | {"fingerprint": digest.hexdigest()[:32]}


def load_split(config: Config, split: str, summary: dict | None = None):
    """The cached split as a datasets.Dataset, memory-mapped. Call prepare() first; summary and errors: checked_entry().

    Columns: images [path], messages [{role, content: [{type, text}]}], label, width, height, image_tokens, sha256.
    """
    path, copy = (os.path.abspath(temp_path(config, f"{split}.{end}")) for end in ("json", "rows"))
    os.environ.setdefault("HF_DATASETS_CACHE", copy)
    from datasets import Dataset, Features, List, Value
    from datasets.data_files import DataFilesDict, DataFilesList

    part = {"type": Value("string"), "text": Value("string")}  # one type for all parts: the picture's has the text None
    types = dict.fromkeys(COLUMNS, Value("string")) | dict.fromkeys(("width", "height", "image_tokens"), Value("int32"))
    types["images"] = List(Value("string"))
    types["messages"] = List({"role": Value("string"), "content": List(part)})
    with lock(config):
        known = tuple(map(str, checked_entry(config, split, summary)["json"]))  # by which `copy` is made anew
        files = DataFilesDict({split: DataFilesList([path], [known])})  # a plain path would be taken for a pattern
        rows = Dataset.from_json(files, split=split, features=Features(types), cache_dir=copy)
    return rows.remove_columns(list(HASHES))
