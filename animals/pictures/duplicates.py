"""Which pictures are the same: across the splits, under two labels, or so near that they belong in one split.

Same pixels means equal size and equal RGB bytes after decoding, whatever the file format. Near-duplicates are pictures
whose 64-bit perceptual hashes (inspection.py) differ in at most config.near_duplicate_distance bits. Beyond SURE bits,
and where one picture is mirrored, their 32x32 thumbnails must correlate too: drawings with few shapes come that near by
chance. A flat picture has no hash and is compared by its pixels only. Measured: benchmarks/results/near_duplicates.md.

duplicates.csv: problem (both splits | two labels | one split), match (same pixels | near), distance (bits), image,
split, label, other_image, other_split, other_label. Of each pair `image` is the held-out picture, or within one split
the later one. Identical pictures in both splits or under two labels stop the command unless config.allow_leaks; the
others are a warning.
"""

import base64
import json
import os
import time
from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np

from animals.pictures.cache import SPLITS, csv_file, fresh_entries, lock, read_cache, read_rows, temp_path, write_cache
from animals.pictures.prepare import commands
from config import Config

SURE = 4  # bits: up to that a pair is near whatever the thumbnails say, unless one picture is mirrored
CORRELATION = 0.87  # of the other pairs' thumbnails; photographs cropped by 2 % reach 0.873 and more
BLOCK = 1 << 22  # hashes that are compared at once: 32 MB
COLUMNS = ["problem", "match", "distance", "image", "split", "label", "other_image", "other_split", "other_label"]


class Pictures(NamedTuple):
    """The usable pictures of some splits, train first; all fields have the same length."""

    image: list[str]  # path, as in the JSON
    split: np.ndarray  # int8, index in SPLITS
    label: np.ndarray  # int32, index in config.labels
    pixels: list[str]  # hash of the pixels
    phash: np.ndarray  # uint64, 0 = none
    mirrored: np.ndarray  # uint64, of the mirrored picture
    thumbnail: np.ndarray  # [n, 32, 32] uint8


class Duplicate(NamedTuple):
    problem: str  # "both splits", "two labels" or "one split"
    match: str  # "same pixels" or "near"
    distance: int  # bits
    row: int  # index of the picture in Pictures, and of the earlier one that it equals
    other: int


def load_pictures(config: Config, splits) -> Pictures:
    """What the JSON files of some splits know of their pictures."""
    parts = [(k, list(read_rows(config, split))) for k, split in enumerate(SPLITS) if split in splits]
    rows = [row for _, part in parts for row in part]
    folders = [os.path.relpath(row["images"][0], config.input_dir).split(os.sep)[1] for row in rows]
    labels = [config.folder_to_label[folder] for folder in folders]  # the row's own may come from an older table
    thumbnails = b"".join(base64.b64decode(row["thumbnail"]) for row in rows)
    return Pictures(
        [row["images"][0] for row in rows],
        np.concatenate([np.full(len(part), k, np.int8) for k, part in parts]),
        np.array([config.labels.index(label) for label in labels], np.int32),
        [row["pixels"] for row in rows],
        *(np.array([int(row[name], 16) for row in rows], np.uint64) for name in ("phash", "mirrored")),
        np.frombuffer(thumbnails, np.uint8).reshape(-1, 32, 32),
    )


def near_pairs(pictures: Pictures, distance: int):
    """Yield arrays (row, other, bits) of near-duplicates, other < row. All pairs of a row come in one yield."""
    from tqdm import tqdm

    hashed = np.flatnonzero(pictures.phash)  # flat pictures have none
    phash, mirrored, thumbnail = pictures.phash[hashed], pictures.mirrored[hashed], pictures.thumbnail[hashed]
    n = len(hashed)
    rows = max(1, BLOCK // max(n, 1))
    for start in tqdm(range(0, n, rows), "comparing pictures", unit=" blocks", disable=None):
        stop = min(start + rows, n)
        found = []
        for others, step, sure in ((phash, 1, SURE), (mirrored, -1, -1)):
            bits = np.bitwise_count(phash[start:stop, None] ^ others[None, :stop])  # [rows, stop]
            row, other = np.nonzero(bits <= distance)
            bits, row = bits[row, other], row + start
            near = (other < row) & (bits <= sure)
            doubtful = np.flatnonzero((other < row) & (bits > sure))
            near[doubtful] = correlate(thumbnail, row[doubtful], thumbnail[:, :, ::step], other[doubtful])
            found.append((hashed[row[near]], hashed[other[near]], bits[near]))
        yield tuple(np.concatenate(column) for column in zip(*found, strict=True))


def correlate(a: np.ndarray, rows: np.ndarray, b: np.ndarray, others: np.ndarray) -> np.ndarray:
    """For each pair of thumbnails a[row] and b[other]: do they correlate at CORRELATION or more (Pearson)?"""
    result = np.zeros(len(rows), bool)
    for start in range(0, len(rows), 4096):  # 32 MB
        part = slice(start, start + 4096)
        x, y = (t[i[part]].reshape(-1, 1024).astype(np.float32) for t, i in ((a, rows), (b, others)))
        x, y = (t - t.mean(axis=1, keepdims=True) for t in (x, y))
        norm = np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1))
        result[part] = (x * y).sum(axis=1) >= CORRELATION * norm
    return result


def find_duplicates(pictures: Pictures, distance: int, limit: int) -> tuple[list[Duplicate], np.ndarray]:
    """The duplicates, identical pictures first, and a group number per picture.

    Pictures that are equal or near, directly or through others, have one number. A picture is listed at most once per
    problem, with the first that it equals, else with the nearest: the list is linear in n. Near-duplicates are
    searched only among at most `limit` pictures.
    """
    n, first = len(pictures.image), {}
    equals = np.array([first.setdefault(pixels, row) for row, pixels in enumerate(pictures.pixels)], np.int64)
    copies = np.flatnonzero(equals != np.arange(n))
    found = list(classify(pictures, "same pixels", copies, equals[copies], np.zeros(len(copies), np.int64)))
    listed = {(duplicate.problem, duplicate.row) for duplicate in found}
    group, links = np.arange(n), [(copies, equals[copies])]
    for row, other, bits in near_pairs(pictures, distance) if n <= limit else ():
        links.append((row, other))
        if sum(len(rows) for rows, _ in links) > BLOCK:  # before they fill the memory
            group, links = join(group, links), []
        found += (d for d in classify(pictures, "near", row, other, bits) if (d.problem, d.row) not in listed)
    return found, join(group, links)


def classify(pictures: Pictures, match: str, row: np.ndarray, other: np.ndarray, bits: np.ndarray):
    """Yield a Duplicate for each problem and row of some pairs: the pair with the nearest other picture."""
    splits, labels = (kind[row] != kind[other] for kind in (pictures.split, pictures.label))
    for problem, wanted in (("both splits", splits), ("two labels", labels), ("one split", ~splits & ~labels)):
        order = np.flatnonzero(wanted)[np.lexsort((other[wanted], bits[wanted], row[wanted]))]
        for k in order[np.flatnonzero(np.diff(row[order], prepend=-1))]:
            yield Duplicate(problem, match, int(bits[k]), int(row[k]), int(other[k]))


def join(group: np.ndarray, links: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Merge the groups of each linked pair. Returns each picture's group, numbered from 0 in the order of rows."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    n = len(group)  # edges: from each picture to a node for its group, and the links
    i, j = (np.concatenate(side) for side in zip((np.arange(n), n + group), *links, strict=True))
    return connected_components(coo_array((np.ones(len(i), np.int8), (i, j)), shape=(2 * n, 2 * n)), False)[1][:n]


def built_from(config: Config, entries: dict[str, dict]) -> str:
    """What a search in the splits of `entries` (fresh ones of cache.json) depends on."""
    limits = config.near_duplicate_distance, config.near_duplicate_limit
    stamps = {split: entry["stamp"] for split, entry in entries.items()}
    return json.dumps([*limits, list(config.folder_to_label.items()), sorted(stamps.items())])


def read_duplicates(config: Config, entries: dict[str, dict]) -> dict | None:
    """The result of an earlier search of the same pictures, or None."""
    found = read_cache(config).get("duplicates", {})
    return found if found.get("built_from") == built_from(config, entries) else None


def search_duplicates(config: Config, entries: dict[str, dict]) -> dict:
    """Find the duplicates in the splits of `entries`; write duplicates.csv, and cache.json for known_duplicates().

    pairs: the rows of duplicates.csv, {column: value}. compared: near-duplicates were searched. groups: the paths of
    each group of several pictures.
    """
    start = time.perf_counter()
    pictures = load_pictures(config, entries)
    found, group = find_duplicates(pictures, config.near_duplicate_distance, config.near_duplicate_limit)
    names = np.array(SPLITS)[pictures.split].tolist(), np.array(config.labels)[pictures.label].tolist()
    about = list(zip(pictures.image, *names, strict=True))
    rows = [(*pair[:3], *about[pair.row], *about[pair.other]) for pair in found]
    with csv_file(config, "duplicates.csv", COLUMNS) as out:
        out(rows)
    groups = defaultdict(list)
    for image, number in zip(pictures.image, group.tolist(), strict=True):
        groups[number].append(image)
    result = {
        "built_from": built_from(config, entries),
        "pairs": [dict(zip(COLUMNS, row, strict=True)) for row in rows],
        "compared": len(pictures.image) <= config.near_duplicate_limit,
        "groups": [images for images in groups.values() if len(images) > 1],
        "seconds": round(time.perf_counter() - start, 2),
    }
    write_cache(config, read_cache(config) | {"duplicates": result})
    return result


def known_duplicates(config: Config) -> dict | None:
    """What is known of duplicates; None unless near-duplicates were searched in exactly today's pictures.

    identical: the held-out pictures with an identical one in train. near_duplicates: those with a near-duplicate there
    and no identical one. group: {picture: number} of all usable pictures of both splits; pictures that are equal or
    near, directly or through others, share a number. Pictures are paths, as in `images` of the JSON files.
    """
    with lock(config):
        entries = fresh_entries(config, read_cache(config))
        found = read_duplicates(config, entries) if len(entries) == len(SPLITS) else None
        if not found or not found["compared"]:
            return None
        usable = [row["images"][0] for split in SPLITS for row in read_rows(config, split)]
    across = [(pair["match"], pair["image"]) for pair in found["pairs"] if pair["problem"] == "both splits"]
    several, numbers = {path: images[0] for images in found["groups"] for path in images}, {}
    return {
        "identical": {image for match, image in across if match == "same pixels"},
        "near_duplicates": {image for match, image in across if match == "near"},
        "group": {path: numbers.setdefault(several.get(path, path), len(numbers)) for path in usable},
    }


def identical_problems(config: Config, duplicates: dict, splits) -> list[str]:
    """The error, if there are identical pictures within `splits` that make the accuracy a wrong number."""
    same = [pair for pair in duplicates["pairs"] if pair["match"] == "same pixels" and pair["problem"] != "one split"]
    same = [pair for pair in same if {pair["split"], pair["other_split"]} <= set(splits)]
    if not same:
        return []
    command = f"{commands(config.input_dir, 'quarantine')[0]} {temp_path(config, 'duplicates.csv')}"
    if any(pair["split"] == pair["other_split"] == "validation" for pair in same):
        command += " --held_out_too"
    said = "; ".join(f"{n:,} same pixels, {problem}" for problem, n in Counter(p["problem"] for p in same).items())
    found = f"identical pictures ({said}), e.g. {same[0]['image']} = {same[0]['other_image']}"
    how = f"take one of each pair away ({command}), or go on with --allow_leaks"
    return [f"{config.input_dir}: found {found}; expected none, because they make the accuracy a wrong number; {how}"]


def describe_duplicates(config: Config, duplicates: dict) -> list[str]:
    """Warnings, a line each: every kind of duplicates with its number, and its first few pairs."""
    lines, kinds = [], defaultdict(list)
    for pair in duplicates["pairs"]:
        splits = " and ".join(sorted({pair["split"], pair["other_split"]}))
        where = "" if pair["problem"] == "both splits" else f" of {splits}"
        kinds[f"{pair['match']}, {pair['problem']}{where}"].append(pair)
    for kind, pairs in kinds.items():
        lines.append(f"warning: {len(pairs):,} {kind} ({temp_path(config, 'duplicates.csv')})")
        for pair in pairs[:3]:
            labels = f" ({pair['label']}, {pair['other_label']})" if pair["label"] != pair["other_label"] else ""
            lines.append(f"    {pair['image']} ~ {pair['other_image']}{labels}, {pair['distance']} of 64 bits differ")
    if not duplicates["compared"]:
        why = f"more than {config.near_duplicate_limit:,} pictures, and the time grows with the square of their number"
        lines.append(f"warning: near-duplicates were not searched: {why}; ask for it with --near_duplicate_limit")
    return lines
