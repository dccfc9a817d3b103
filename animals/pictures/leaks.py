"""Which pictures are the same: across the splits, under two labels, or near enough to belong on one side of a cut.

Same pixels means equal size and equal RGB bytes after decoding, whatever the file format. Near means that the 64-bit
perceptual hashes (check.py) differ in at most config.near_duplicate_distance bits: a recompressed or resized copy
differs in 0 to 4, unrelated photographs in about 32. A flat picture has no hash and is only ever compared by pixels.

leaks.csv: problem (both splits | two labels), match (same pixels | near), distance (bits), image, split, label,
other_image, other_split, other_label. Identical pictures stop the build unless config.allow_leaks, near ones warn.

Nothing is quadratic in the number of pictures: see near_pairs().
"""

import csv
import json
import math
import os
import time
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from animals.files import replacing
from animals.pictures.cache import FORMAT, SPLITS, csv_file, read_meta, split_folder, stamp, temp_path
from config import Config

CANDIDATES = 1024  # at most, a picture and table: bounds the time when thousands of different pictures look alike
BLOCK = 1 << 21  # candidate pairs compared at once: 50 MB


class Pictures(NamedTuple):
    """Usable pictures of all splits, one row each."""

    split: np.ndarray  # int8, 0 = train, 1 = validation
    label: np.ndarray  # int32, number of the label
    pixels: np.ndarray  # [n, 2] uint64, hash of the pixels
    phash: np.ndarray  # uint64, perceptual hash, 0 = none


class Leak(NamedTuple):
    problem: str  # "both splits" or "two labels"
    match: str  # "same pixels" or "near"
    distance: int  # bits
    row: int  # of the picture, and of the one it equals
    other: int


def near_pairs(a: np.ndarray, b: np.ndarray, distance: int, capped: np.ndarray):
    """Yield arrays (i, j, bits) with bits = popcount(a[i] ^ b[j]) <= distance; a pair may come more than once.

    Pigeonhole: cut the 64 bits into m > distance chunks; two hashes within `distance` agree on at least m - distance
    of them, so for each choice of m - distance chunks only hashes that agree there are compared (sorted, not hashed).
    m grows with n so that about 8 unrelated hashes share a key: time is n log n times the number of choices, which is
    15 for distance 4 and a million pictures. `capped[i]` is set where more than CANDIDATES shared a key.
    """
    chunks = distance + 1
    while chunks < distance + 3 and 64 * (chunks - distance) / chunks < math.log2(max(len(b), 1) + 1) - 3:
        chunks += 1
    bit = np.arange(64)
    for agreeing in combinations(range(chunks), chunks - distance):
        chosen = np.isin(bit % chunks, agreeing)  # interleaved: every chunk has low and high frequencies
        mask = np.uint64(sum(1 << int(k) for k in bit[chosen]))
        order_a, order_b = np.argsort(a & mask), np.argsort(b & mask)
        keys_a, keys_b = (a & mask)[order_a], (b & mask)[order_b]
        first = np.searchsorted(keys_b, keys_a, "left")
        count = np.searchsorted(keys_b, keys_a, "right") - first
        capped[order_a[count > CANDIDATES]] = True
        count = np.minimum(count, CANDIDATES)
        ends = np.cumsum(count)
        start = 0
        while start < len(a):
            before = int(ends[start - 1]) if start else 0
            stop = max(start + 1, int(np.searchsorted(ends, before + BLOCK, "right")))
            n = count[start:stop]
            i = np.repeat(np.arange(start, stop), n)
            j = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n) + first[i]
            i, j = order_a[i], order_b[j]
            bits = np.bitwise_count(a[i] ^ b[j])
            near = bits <= distance
            yield i[near], j[near], bits[near]
            start = stop


def find_leaks(pictures: Pictures, distance: int) -> tuple[list[Leak], int]:
    """Leaks, identical pictures first, and how many pictures had too many look-alikes to compare them all.

    One row a validation picture and match (with one training picture that it equals or is nearest to), and one row a
    picture whose label differs from that of the first picture with the same pixels. So the list is linear in n.
    """
    leaks = []
    split, label, pixels = pictures.split, pictures.label, pictures.pixels
    order = np.lexsort((np.arange(len(split)), split, pixels[:, 1], pixels[:, 0]))  # train first within equals
    new = np.ones(len(order), bool)
    new[1:] = (pixels[order[1:]] != pixels[order[:-1]]).any(axis=1)
    starts = np.flatnonzero(new)
    sizes = np.diff(np.append(starts, len(order)))
    leaked = np.zeros(len(split), bool)
    for start, size in zip(starts[sizes > 1], sizes[sizes > 1], strict=True):
        first, *others = order[start : start + size]
        for other in others:
            if split[other] != split[first]:
                leaks.append(Leak("both splits", "same pixels", 0, int(other), int(first)))
                leaked[other] = True
            if label[other] != label[first]:
                leaks.append(Leak("two labels", "same pixels", 0, int(other), int(first)))
    hashed = pictures.phash != 0
    train, first_train = unique(pictures.phash, np.flatnonzero(hashed & (split == 0)))
    held, _ = unique(pictures.phash, np.flatnonzero(hashed & (split == 1) & ~leaked))
    best = np.full(len(held), np.iinfo(np.int64).max)
    capped = np.zeros(len(held), bool)
    for i, j, bits in near_pairs(held, train, distance, capped):
        np.minimum.at(best, i, bits.astype(np.int64) << 40 | first_train[j])
    rows = np.flatnonzero(hashed & (split == 1) & ~leaked)
    where = np.searchsorted(held, pictures.phash[rows])
    for row, found in zip(rows, best[where] if len(held) else (), strict=True):
        if found != np.iinfo(np.int64).max:
            leaks.append(Leak("both splits", "near", int(found >> 40), int(row), int(found & (1 << 40) - 1)))
    return leaks, int(capped[where].sum()) if len(held) else 0


def unique(values: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct values of some rows, sorted, and the first row of each."""
    distinct, first = np.unique(values[rows], return_index=True)
    return distinct, rows[first].astype(np.int64)


def groups(pictures: Pictures, distance: int) -> tuple[np.ndarray, int]:
    """A group number a picture: equal or near pictures, and what is equal or near to those, share one."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    n = len(pictures.split)
    _, same = np.unique(pictures.pixels, axis=0, return_inverse=True)
    edges = [link_equal(same.reshape(-1), np.arange(n))]
    hashed = np.flatnonzero(pictures.phash)
    edges.append(link_equal(pictures.phash[hashed], hashed))
    distinct, first = unique(pictures.phash, hashed)
    capped = np.zeros(len(distinct), bool)
    edges += [(first[i], first[j]) for i, j, _ in near_pairs(distinct, distinct, distance, capped)]
    i, j = (np.concatenate(side) for side in zip(*edges, strict=True))
    return connected_components(coo_array((np.ones(len(i), np.int8), (i, j)), shape=(n, n)), False)[1], int(
        capped.sum()
    )


def link_equal(values: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Edges that chain the rows of equal value."""
    order = np.argsort(values, kind="stable")
    equal = values[order[1:]] == values[order[:-1]]
    return rows[order[:-1][equal]], rows[order[1:][equal]]


# --- the search over the caches ---------------------------------------------------------------------------------------


def leak_file(summaries, suffix: str) -> str:
    """leaks.csv of both splits; of one split alone (only labels can conflict there) leaks.<split>.csv."""
    return f"leaks.{suffix}" if set(summaries) == set(SPLITS) else f"leaks.{'+'.join(summaries)}.{suffix}"


def leak_key(config: Config, summaries: dict) -> list:
    pictures = [[split, summaries[split]["fingerprint"]] for split in sorted(summaries)]
    return [FORMAT, config.input_dir, config.near_duplicate_distance, pictures]


def read_leaks(config: Config, summaries: dict) -> dict | None:
    """The result of an earlier search of the same pictures, or None."""
    try:
        found = json.loads((Path(config.temp_dir) / leak_file(summaries, "meta.json")).read_text(encoding="utf-8"))
        return found if found["key"] == leak_key(config, summaries) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def load_pictures(config: Config, splits):
    """Pictures of the usable pictures of some splits, and the path of one by its row number."""
    parts, tables, starts = [], [], [0]
    for split in splits:
        with pa.memory_map(str(temp_path(config, split, "checked.arrow"))) as source, pa.ipc.open_stream(source) as s:
            rows = s.read_all()
        rows = rows.filter(pc.equal(rows["reason"], "")).select(["path", "pixels", "phash"])
        labels = {f.encode(): config.labels.index(label) for f, label in config.folder_to_label.items()}
        label = np.empty(len(rows), np.int32)
        done = 0
        for chunk in rows["path"].chunks:
            for path in chunk.to_pylist():
                label[done] = labels[path.partition(os.sep.encode())[0]]
                done += 1
        pixels = b"".join(c.buffers()[1][16 * c.offset : 16 * (c.offset + len(c))] for c in rows["pixels"].chunks)
        parts.append(
            Pictures(
                np.full(len(rows), SPLITS.index(split), np.int8),
                label,
                np.frombuffer(pixels, np.uint64).reshape(-1, 2),
                rows["phash"].to_numpy(),
            )
        )
        tables.append(rows["path"])
        starts.append(starts[-1] + len(rows))

    def name(row: int) -> tuple[str, str]:
        """(split, path below the split's folder)"""
        k = int(np.searchsorted(starts, row, "right")) - 1
        return list(splits)[k], tables[k][row - starts[k]].as_py().decode()

    return Pictures(*(np.concatenate(column) for column in zip(*parts, strict=True))), name


def search_leaks(config: Config, summaries: dict) -> dict:
    """Find leaks, write leaks.csv, remember the counts."""
    start = time.perf_counter()
    pictures, name = load_pictures(config, summaries)
    leaks, capped = find_leaks(pictures, config.near_duplicate_distance)
    examples, counts = {}, Counter()

    def describe(row):
        split, path = name(row)
        return os.path.join(split_folder(config, split), path), split, config.labels[pictures.label[row]]

    columns = ["problem", "match", "distance", "image", "split", "label", "other_image", "other_split", "other_label"]
    with csv_file(config, leak_file(summaries, "csv"), columns) as rows:
        for leak in leaks:
            image, other = describe(leak.row), describe(leak.other)
            rows.writerow([leak.problem, leak.match, leak.distance, *image, *other])
            kind = f"{leak.match}, {leak.problem}"
            counts[kind] += 1
            counts["same" if leak.match == "same pixels" else "near"] += 1
            examples.setdefault(kind, [])
            if len(examples[kind]) < 3:
                examples[kind].append([leak.distance, *image, *other])
    result = {
        "key": leak_key(config, summaries),
        "counts": {"same": 0, "near": 0, **counts},
        "examples": examples,
        "capped": capped,
        "seconds": round(time.perf_counter() - start, 2),
    }
    with replacing(Path(config.temp_dir) / leak_file(summaries, "meta.json")) as file:
        file.write(json.dumps(result, indent=1).encode())
    return result


def leak_problem(config: Config, leaks: dict, splits) -> str:
    kinds = "; ".join(f"{n:,} {kind}" for kind, n in leaks["counts"].items() if kind.startswith("same pixels"))
    first = next(pairs[0] for kind, pairs in leaks["examples"].items() if kind.startswith("same pixels"))
    where = Path(config.temp_dir) / leak_file(splits, "csv")
    return (
        f"{config.input_dir}: found identical pictures ({kinds}), e.g. {first[1]} = {first[4]}; expected none, "
        f"they make the accuracy a wrong number; remove one of each pair in {where}, or go on with --allow_leaks"
    )


def leak_table(config: Config, leaks: dict, splits) -> str:
    """The kinds of leaks with their number and the first few pairs."""
    lines = []
    for kind, examples in leaks["examples"].items():
        lines.append(f"warning: {leaks['counts'][kind]:,} {kind} ({Path(config.temp_dir) / leak_file(splits, 'csv')})")
        for bits, image, _, label, other, _, other_label in examples:
            labels = f" ({label}, {other_label})" if label != other_label else ""
            lines.append(f"    {image} ~ {other}{labels}, {bits} of 64 bits differ")
    if leaks["capped"]:
        lines.append(
            f"warning: {leaks['capped']:,} pictures look like more than 1,024 others; not all of those were compared"
        )
    return "\n".join(lines)


def known_leaks(config: Config) -> dict | None:
    """What the last check of both splits says of the held-out pictures, or None if it was of other pictures.

    identical, look_alikes: the validation paths with such a picture in train; group: {validation path: number}, one
    number for all that look alike.
    """
    metas = {split: read_meta(config, split) for split in SPLITS}
    if not all(meta and meta["stamp"] == stamp(config, split) for split, meta in metas.items()):
        return None
    if read_leaks(config, {split: meta["summary"] for split, meta in metas.items()}) is None:
        return None
    with open(Path(config.temp_dir) / leak_file(SPLITS, "csv"), newline="", encoding="utf-8") as file:
        across = [row for row in csv.DictReader(file) if row["problem"] == "both splits"]
    pictures, name = load_pictures(config, SPLITS)
    number, _ = groups(pictures, config.near_duplicate_distance)
    held_out = {}
    for row in np.flatnonzero(pictures.split):
        split, path = name(int(row))
        held_out[os.path.join(split_folder(config, split), path)] = int(number[row])
    return {
        "identical": {row["image"] for row in across if row["match"] == "same pixels"},
        "look_alikes": {row["image"] for row in across if row["match"] == "near"},
        "group": held_out,
    }
