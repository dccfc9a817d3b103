"""How many changed copies of a picture are found as near-duplicates, and how many other pictures are taken for some.

    python benchmarks/near_duplicates.py                        # 600 pictures drawn by demo/make_pictures.py
    python benchmarks/near_duplicates.py FOLDER [--limit 600]   # the pictures below a folder
    python benchmarks/near_duplicates.py FOLDER --name photographs --near_duplicate_distance 4

Every picture is copied with each change in memory, and the search of animals/pictures/duplicates.py runs over originals
and copies. Recall: share of the copies that are found near their original. False pairs: pairs of originals that are
found near each other; some of a folder may be true, look at them (--show). Puts its table, under --name, into
benchmarks/results/near_duplicates.md; last line of stdout is the same as JSON. About 30 ms per picture and core.
"""

import argparse
import io
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from animals.pictures.duplicates import Pictures, near_pairs
from animals.pictures.inspection import fingerprint
from animals.pictures.read import PictureError, list_pictures, load_picture
from config import Config

RESULTS = ROOT / "benchmarks" / "results" / "near_duplicates.md"


def scaled(factor):
    return lambda p: p.resize([max(8, round(side * factor)) for side in p.size], Image.Resampling.LANCZOS)


def jpeg(quality):
    def change(picture):
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality)
        return Image.open(file).convert("RGB")

    return change


def cropped(share):
    return lambda p: ImageOps.crop(p, (round(p.width * share), round(p.height * share)) * 2)


def bordered(share):
    return lambda p: ImageOps.expand(p, round(min(p.size) * share), "white")


def banner(share):
    def change(picture):
        picture = picture.copy()
        picture.paste("black", (0, round(picture.height * (1 - share)), *picture.size))
        return picture

    return change


CHANGES = {
    **{f"resized x{factor}": scaled(factor) for factor in (0.4, 0.5, 0.63, 0.75, 1.3, 1.7, 2.2)},
    **{f"JPEG {quality}": jpeg(quality) for quality in (30, 50, 75, 95)},
    "mirrored": ImageOps.mirror,
    "mirrored, x0.63, JPEG 50": lambda p: jpeg(50)(scaled(0.63)(ImageOps.mirror(p))),
    "cropped by 2 % per side": cropped(0.02),
    "cropped by 5 % per side": cropped(0.05),
    "white border of 2 %": bordered(0.02),
    "white border of 5 %": bordered(0.05),
    "black banner of 8 %": banner(0.08),
    "brightness x0.7": lambda p: ImageEnhance.Brightness(p).enhance(0.7),
    "brightness x1.3": lambda p: ImageEnhance.Brightness(p).enhance(1.3),
}


def fingerprints(path) -> list | None:
    """fingerprint() of a picture and of each changed copy; None if it is unusable."""
    try:
        picture = load_picture(path)
    except PictureError:
        return None
    return [fingerprint(change(picture)) for change in (lambda p: p, *CHANGES.values())]


def pictures_of(rows) -> Pictures:
    phash, mirrored, thumbnails = zip(*rows, strict=True)
    n, zeros = len(rows), np.zeros(len(rows), np.int8)
    hashes = np.array(phash, np.uint64), np.array(mirrored, np.uint64)
    thumbnail = np.frombuffer(b"".join(thumbnails), np.uint8).reshape(n, 32, 32)
    return Pictures([""] * n, zeros, zeros, [""] * n, *hashes, thumbnail)


def measure(paths, distance: int, show: bool) -> dict:
    with ProcessPoolExecutor() as pool:
        found = list(pool.map(fingerprints, paths, chunksize=8))
    paths = [path for path, row in zip(paths, found, strict=True) if row]
    found = [row for row in found if row]
    n, recall = len(found), {}
    for k, change in enumerate(CHANGES, start=1):
        pairs = near_pairs(pictures_of([row[0] for row in found] + [row[k] for row in found]), distance)
        recall[change] = sum(int((row - other == n).sum()) for row, other, _ in pairs) / n
    pairs = [
        tuple(map(int, pair))
        for block in near_pairs(pictures_of([row[0] for row in found]), distance)
        for pair in zip(*block, strict=True)
    ]
    for row, other, bits in pairs if show else ():
        print(f"{bits} bits: {paths[row]} ~ {paths[other]}", file=sys.stderr)
    return {"pictures": n, "distance": distance, "recall": recall, "pairs": n * (n - 1) // 2, "near_pairs": len(pairs)}


def report(name: str, command: str, found: dict) -> str:
    lines = [
        f"## {name}",
        "",
        f"`{command}`: {found['pictures']:,} pictures, at most {found['distance']} of 64 bits.",
        "",
        "| change | copies found |",
        "|---|---|",
        *(f"| {change} | {share:.3f} |" for change, share in found["recall"].items()),
        "",
        f"Of the {found['pairs']:,} pairs of originals {found['near_pairs']:,} are found near.",
        "",
    ]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("folder", nargs="?", help="pictures; default: drawn ones")
    parser.add_argument("--limit", type=int, default=600, help="pictures at most; 0 = all")
    parser.add_argument("--name", default="drawings", help="heading of the table; one of that name is replaced")
    parser.add_argument("--near_duplicate_distance", type=int, default=Config().near_duplicate_distance)
    parser.add_argument("--show", action="store_true", help="list the pairs of originals that are found near")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="benchmark-near-duplicates-") as drawn:
        if not args.folder:
            count = ["--train", str(max(args.limit, 10) // 10 + 1), "--validation", "1", "--test", "0"]
            subprocess.run([sys.executable, ROOT / "demo" / "make_pictures.py", drawn, *count], check=True)
        paths = list_pictures(args.folder or drawn)
        if args.limit and len(paths) > args.limit:
            paths = [paths[i] for i in np.linspace(0, len(paths) - 1, args.limit).astype(int)]
        found = measure(paths, args.near_duplicate_distance, args.show)
    flags = [f"--limit {args.limit}"] * (args.limit != 600) + [f"--name {args.name}"] * (args.name != "drawings")
    if args.near_duplicate_distance != Config().near_duplicate_distance:
        flags.append(f"--near_duplicate_distance {args.near_duplicate_distance}")
    command = " ".join(["python benchmarks/near_duplicates.py", *["FOLDER"] * bool(args.folder), *flags])
    text = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else "# Near-duplicates: what is found\n\n"
    text = re.sub(rf"## {re.escape(args.name)}\n.*?(?=## |\Z)", "", text, flags=re.S)
    RESULTS.write_text(text.rstrip() + "\n\n" + report(args.name, command, found), encoding="utf-8")
    print(report(args.name, command, found), file=sys.stderr)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
