"""Which pictures are the same: across the splits, under two labels, or near enough to belong on one side of a cut.

Same pixels means equal size and equal RGB bytes after decoding, whatever the file format. Near means that the 64-bit
perceptual hashes (check.py) differ in at most config.near_duplicate_distance bits. Beyond SURE bits, and where one
picture is mirrored, the 32x32 thumbnails must correlate too: drawings with few shapes come that near by chance. A flat
picture has no hash and is only ever compared by pixels. What is found this way: benchmarks/results/look_alikes.md.

leaks.csv: problem (both splits | two labels | one split), match (same pixels | near), distance (bits), image, split,
label, other_image, other_split, other_label. Of each pair `image` is the one to take away: not the training picture,
else the later one. Identical pictures in both splits or under two labels stop the build unless config.allow_leaks; the
others warn.
"""

import json
import os
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from animals.files import replacing
from animals.pictures.cache import FORMAT, SPLITS, csv_file, fresh_meta, read_checked, split_folder
from config import Config

SURE = 4  # bits: so near is near, whatever the thumbnails say, unless one is mirrored
CORRELATION = 0.87  # of the other pairs' thumbnails; 2 % crops of photographs: 0.873 and more
BLOCK = 1 << 22  # hashes compared at once: 32 MB
COLUMNS = ["problem", "match", "distance", "image", "split", "label", "other_image", "other_split", "other_label"]


class Pictures(NamedTuple):
    """Usable pictures of some splits, train first, one row each."""

    image: list[str]  # path, as in the JSON
    split: np.ndarray  # int8, index in SPLITS
    label: np.ndarray  # int32, number of the label
    pixels: list[str]  # hash of the pixels
    phash: np.ndarray  # uint64, 0 = none
    mirrored: np.ndarray  # uint64, of the mirrored picture
    thumbnail: np.ndarray  # [n, 32, 32] uint8


class Leak(NamedTuple):
    problem: str  # "both splits", "two labels" or "one split"
    match: str  # "same pixels" or "near"
    distance: int  # bits
    row: int  # of the picture, and of the earlier one it equals
    other: int


def load_pictures(config: Config, splits) -> Pictures:
    """What the check knows of the usable pictures of some splits."""
    found = [
        (index, row)
        for index, split in enumerate(SPLITS)
        for row in (read_checked(config, split) if split in splits else ())
        if not row["reason"]
    ]
    names = [row["path"].decode() for _, row in found]
    label = [config.labels.index(config.folder_to_label[name.partition(os.sep)[0]]) for name in names]
    folders = [split_folder(config, split) for split in SPLITS]
    return Pictures(
        [os.path.join(folders[index], name) for (index, _), name in zip(found, names, strict=True)],
        np.array([index for index, _ in found], np.int8),
        np.array(label, np.int32),
        [row["pixels"] for _, row in found],
        np.array([row["phash"] for _, row in found], np.uint64),
        np.array([row["mirrored"] for _, row in found], np.uint64),
        np.frombuffer(b"".join(row["thumbnail"] for _, row in found), np.uint8).reshape(-1, 32, 32),
    )


def near_pairs(pictures: Pictures, distance: int):
    """Yield arrays (row, other, bits) of near pictures, other < row. All pairs of a row come at once."""
    from tqdm import tqdm

    hashed = np.flatnonzero(pictures.phash)  # flat pictures have none
    phash, mirrored, thumbnail = pictures.phash[hashed], pictures.mirrored[hashed], pictures.thumbnail[hashed]
    n = len(hashed)
    rows = max(1, BLOCK // max(n, 1))
    with tqdm(total=n, desc="look-alikes", unit=" pictures", disable=None) as bar:
        for start in range(0, n, rows):
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
            bar.update(stop - start)
            yield tuple(np.concatenate(column) for column in zip(*found, strict=True))


def correlate(a: np.ndarray, rows: np.ndarray, b: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Whether a[row] and b[other], thumbnails, correlate at CORRELATION or more (Pearson), for each pair."""
    result = np.zeros(len(rows), bool)
    for start in range(0, len(rows), 4096):  # 32 MB
        part = slice(start, start + 4096)
        x, y = (t[i[part]].reshape(-1, 1024).astype(np.float32) for t, i in ((a, rows), (b, others)))
        x, y = (t - t.mean(axis=1, keepdims=True) for t in (x, y))
        norm = np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1))
        result[part] = (x * y).sum(axis=1) >= CORRELATION * norm
    return result


def problem_of(pictures: Pictures, row, other) -> np.ndarray:
    """The problems of pairs as [2, n] booleans: both splits, two labels. Neither: one split."""
    return np.array([pictures.split[row] != pictures.split[other], pictures.label[row] != pictures.label[other]])


def find_leaks(pictures: Pictures, distance: int, limit: int) -> tuple[list[Leak], np.ndarray]:
    """Leaks, identical pictures first, and a group number a picture: what is equal or near, directly or over others.

    A picture has at most one row a problem and match: with the first that it equals, with the nearest that it
    resembles. So the list is linear in n. Of more than `limit` pictures only equal ones are found.
    """
    n = len(pictures.image)
    first = {}
    equals = np.array([first.setdefault(pixels, row) for row, pixels in enumerate(pictures.pixels)], np.int64)
    leaks = same_leaks(pictures, equals)
    listed = {(leak.problem, leak.row) for leak in leaks}
    group, links = np.arange(n), [(np.arange(n), equals)]
    for row, other, bits in near_pairs(pictures, distance) if n <= limit else ():
        links.append((row, other))
        if sum(len(rows) for rows, _ in links) > BLOCK:  # before they fill the memory
            group, links = join(group, links), []
        splits, labels = problem_of(pictures, row, other)
        for problem, wanted in (("both splits", splits), ("two labels", labels), ("one split", ~splits & ~labels)):
            order = np.lexsort((other[wanted], bits[wanted], row[wanted]))
            r, o, b = row[wanted][order], other[wanted][order], bits[wanted][order]
            nearest = np.flatnonzero(np.diff(r, prepend=-1))
            for k in nearest:
                if (problem, int(r[k])) not in listed:
                    leaks.append(Leak(problem, "near", int(b[k]), int(r[k]), int(o[k])))
    return leaks, join(group, links)


def same_leaks(pictures: Pictures, equals: np.ndarray) -> list[Leak]:
    """A row for each picture and problem with the first picture of the same pixels."""
    leaks = []
    for row in np.flatnonzero(equals != np.arange(len(equals))):
        other = equals[row]
        splits, labels = problem_of(pictures, row, other)
        problems = ["both splits"] * bool(splits) + ["two labels"] * bool(labels) or ["one split"]
        leaks += [Leak(problem, "same pixels", 0, int(row), int(other)) for problem in problems]
    return leaks


def join(group: np.ndarray, links: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """The groups after the rows of each link have come together, numbered from 0 in the order of their first row."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    n = len(group)  # each picture is linked to a node for its group, and to what it resembles
    i, j = (np.concatenate(side) for side in zip((np.arange(n), n + group), *links, strict=True))
    return connected_components(coo_array((np.ones(len(i), np.int8), (i, j)), shape=(2 * n, 2 * n)), False)[1][:n]


# --- the search over the caches ---------------------------------------------------------------------------------------


def leak_key(config: Config, metas: dict[str, dict]) -> list:
    """What a search depends on. `metas`: fresh_meta() of each split, {} where there is none."""
    rules = [FORMAT, config.input_dir, config.near_duplicate_distance, config.look_alike_limit]
    stamps = {split: meta["stamp"] for split, meta in metas.items() if meta}
    return [*rules, list(config.folder_to_label.items()), stamps]


def read_leaks(config: Config, metas: dict[str, dict]) -> dict | None:
    """The result of an earlier search of the same pictures, or None."""
    try:
        found = json.loads((Path(config.temp_dir) / "leaks.meta.json").read_text(encoding="utf-8"))
        return found if found["key"] == json.loads(json.dumps(leak_key(config, metas))) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def search_leaks(config: Config, metas: dict[str, dict]) -> dict:
    """Find leaks in the splits that are checked, write leaks.csv, and remember in leaks.meta.json what others ask for.

    kinds: [{match, problem, splits, n, examples}], splits being those that hold the pair. compared: whether look-alikes
    were searched. identical, look_alikes, group: see known_leaks().
    """
    start = time.perf_counter()
    pictures = load_pictures(config, [split for split, meta in metas.items() if meta])
    leaks, group = find_leaks(pictures, config.near_duplicate_distance, config.look_alike_limit)
    kinds, twins = {}, {"same pixels": [], "near": []}
    with csv_file(config, "leaks.csv", COLUMNS) as out:
        for leak in leaks:
            sides = [
                (pictures.image[row], SPLITS[pictures.split[row]], config.labels[pictures.label[row]])
                for row in (leak.row, leak.other)
            ]
            values = [leak.problem, leak.match, leak.distance, *sides[0], *sides[1]]
            out.writerow(values)
            splits = sorted({sides[0][1], sides[1][1]})
            new = {"match": leak.match, "problem": leak.problem, "splits": splits, "n": 0, "examples": []}
            kind = kinds.setdefault((leak.match, leak.problem, *splits), new)
            kind["n"] += 1
            if len(kind["examples"]) < 3:
                kind["examples"].append(dict(zip(COLUMNS, values, strict=True)))
            if leak.problem == "both splits":
                twins[leak.match].append(sides[0][0])
    held = np.flatnonzero(pictures.split == SPLITS.index("validation"))
    numbers = np.unique(group[held], return_inverse=True)[1].tolist()
    result = {
        "key": leak_key(config, metas),
        "kinds": list(kinds.values()),
        "compared": len(pictures.image) <= config.look_alike_limit,
        "identical": twins["same pixels"],
        "look_alikes": twins["near"],
        "group": dict(zip((pictures.image[row] for row in held), numbers, strict=True)),
        "seconds": round(time.perf_counter() - start, 2),
    }
    with replacing(Path(config.temp_dir) / "leaks.meta.json") as file:
        json.dump(result, file, indent=1)
    return result


def known_leaks(config: Config) -> dict | None:
    """What is known of the held-out pictures' twins; None if look-alikes were not searched in exactly today's pictures.

    identical: the held-out pictures with an identical one in train. look_alikes: those with a near one there, and no
    identical one. group: {held-out picture: number}; pictures that are equal or near, directly or over others, share a
    number. Pictures are paths, as in `images` of validation.json. Reads the listing of both splits, no picture.
    """
    metas = {split: fresh_meta(config, split) for split in SPLITS}
    found = read_leaks(config, metas) if all(metas.values()) else None
    if not found or not found["compared"]:
        return None
    return found | {key: set(found[key]) for key in ("identical", "look_alikes")}


def stopping(leaks: dict, splits) -> list[dict]:
    """The kinds of identical pictures within `splits` that make the accuracy a wrong number."""
    found = [kind for kind in leaks["kinds"] if kind["match"] == "same pixels" and kind["problem"] != "one split"]
    return [kind for kind in found if set(kind["splits"]) <= set(splits)]


def leak_problem(config: Config, kinds: list[dict]) -> str:
    said = "; ".join(f"{kind['n']:,} {kind['match']}, {kind['problem']}" for kind in kinds)
    first = kinds[0]["examples"][0]
    where = Path(config.temp_dir) / "leaks.csv"
    return (
        f"{config.input_dir}: found identical pictures ({said}), e.g. {first['image']} = {first['other_image']}; "
        f"expected none, they make the accuracy a wrong number; take one of each pair away (--quarantine {where} of "
        "data_process_utils.py does), or go on with --allow_leaks"
    )


def leak_table(config: Config, leaks: dict) -> str:
    """The kinds of leaks with their number and the first few pairs."""
    lines = []
    for kind in leaks["kinds"]:
        where = "" if kind["problem"] == "both splits" else f" of {' and '.join(kind['splits'])}"
        lines.append(
            f"warning: {kind['n']:,} {kind['match']}, {kind['problem']}{where} ({Path(config.temp_dir) / 'leaks.csv'})"
        )
        for pair in kind["examples"]:
            labels = f" ({pair['label']}, {pair['other_label']})" if pair["label"] != pair["other_label"] else ""
            lines.append(f"    {pair['image']} ~ {pair['other_image']}{labels}, {pair['distance']} of 64 bits differ")
    if not leaks["compared"]:
        lines.append(
            f"warning: look-alikes were not searched: more than {config.look_alike_limit:,} pictures, and the time "
            "grows with the square; ask for it with --look_alike_limit"
        )
    return "\n".join(lines)
