"""What the check of the pictures costs, compared with merely decoding them.

    python benchmarks/picture_check.py                          # pairs: about 5 minutes on 2 cores
    python benchmarks/picture_check.py --scale                  # 10,000 and 100,000 entries: about 2 minutes
    python benchmarks/picture_check.py --pictures 2000          # a quick look

Draws its pictures in a temporary folder that it removes. Rounds are interleaved (decode, cold, warm, decode,
...), so a busy machine slows all of them alike; compare the ratios, not the seconds. Writes
benchmarks/results/picture_check.md or picture_check_scale.md; the last line of stdout is the same as JSON.
"""

import argparse
import io
import itertools
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from config import FOLDER_TO_LABEL

CORES = len(os.sched_getaffinity(0))
RESULTS = ROOT / "benchmarks" / "results"


def draw(job) -> None:
    """One 300x225 JPEG of about 20 KB: coarse shapes with noise, different for each seed."""
    path, seed = job
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((300, 225), Image.BICUBIC)
    noisy = np.asarray(coarse).astype(np.int16) + rng.integers(-12, 13, (225, 300, 3), dtype=np.int16)
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=85)


def draw_tree(root: Path, n: int) -> None:
    jobs, folders = [], list(FOLDER_TO_LABEL)
    for split in ("train", "validation"):
        for folder in folders:
            (root / f"{split}_data" / folder).mkdir(parents=True)
    for i in range(n):
        split = "validation" if i // 10 % 5 == 0 else "train"
        jobs.append((root / f"{split}_data" / folders[i % 10] / f"{i}.jpg", i))
    with ProcessPoolExecutor(CORES) as pool:
        list(pool.map(draw, jobs, chunksize=64))


# --- the steps that are timed: each a fresh process, seconds and peak memory on its last line -------------------------


def decode_one(path):
    with Image.open(path) as picture:
        picture.convert("RGB")


def step_decode(root):
    """Merely decode all pictures with as many processes as the check uses."""
    paths = [str(path) for path in root.rglob("*.jpg")]
    with ProcessPoolExecutor(CORES) as pool:
        for _ in pool.map(decode_one, paths, chunksize=32):
            pass


def prepare(root):
    from animals.pictures import prepare as caches
    from config import Config

    config = Config(input_dir=str(root), temp_dir=str(root.parent / "temp"))
    return config, caches.prepare(config)


def step_check(root):
    """prepare(): cold where temp is empty, else warm."""
    from animals.pictures.cache import read_cache

    config, summaries = prepare(root)
    summary, duplicates = summaries["train"], read_cache(config)["duplicates"]
    return {"decoded": summary["decoded"] if summary["built"] else 0, "search": duplicates["seconds"]}


def step_build(root):
    """The first build of a tree of scale(): real listing, caches and search for duplicates; the facts about the 500
    sources are looked up instead of decoding each link to them again."""
    from animals.pictures import inspection

    facts = [inspection.inspect(root.parent / "small" / f"{i}.jpg") for i in range(500)]
    inspection.inspect_all = lambda paths, _: (facts[int(Path(path).stem) % 500] for path in paths)
    prepare(root)


def step_list(root):
    """Merely list the tree and ask for each file's size and times: what no check of freshness can do without."""
    for folder in sorted(root.glob("*/*")):
        with os.scandir(folder) as found:
            for entry in sorted(found, key=lambda entry: entry.name):
                entry.stat()


def step_load(root):
    """A warm start and 1,000 rows at random."""
    from animals.pictures.cache import load_split

    config, summaries = prepare(root)
    rows = load_split(config, "train")
    for i in np.random.default_rng(0).integers(0, len(rows), 1000):
        assert rows[int(i)]["label"]
    return {"rows": len(rows), "built": summaries["train"]["built"]}


def step_search(root):
    """The search for duplicates alone on `root` random hashes, a fifth of them held out, 1 % of those near-copies."""
    from animals.pictures.duplicates import Pictures, find_duplicates

    n, rng = int(root.name), np.random.default_rng(0)
    split = (np.arange(n) >= n - n // 5).astype(np.int8)
    phash, mirrored = rng.integers(1, 1 << 63, (2, n), dtype=np.uint64)
    copies = np.flatnonzero(split)[::100]
    phash[copies] = phash[: len(copies)] ^ np.uint64(0b1011)
    names = [str(i) for i in range(n)]
    pictures = Pictures(names, split, np.zeros(n, np.int32), names, phash, mirrored, np.zeros((n, 32, 32), np.uint8))
    start = time.perf_counter()
    found, _ = find_duplicates(pictures, 4, n)
    assert len(found) == len(copies), (len(found), len(copies))
    return {"seconds": time.perf_counter() - start}


def run(step, root) -> dict:
    done = subprocess.run(
        [sys.executable, __file__, "--step", step, "--root", str(root)], stdout=subprocess.PIPE, check=True,
        stderr=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(root) + ".hf"},
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def run_step(step, root) -> None:
    start = time.perf_counter()
    found = globals()[f"step_{step}"](root) or {}
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # MiB, of this process without its workers
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(u.ru_utime + u.ru_stime for u in used)  # imports and workers included
    print(json.dumps({"seconds": seconds, "cpu": cpu, "peak_mib": peak, **found}))


# --- the tables -------------------------------------------------------------------------------------------------------


def compare(n: int, rounds: int, root: Path) -> list[dict]:
    draw_tree(root / "input", n)
    results = []
    for k in range(rounds):
        shutil.rmtree(root / "temp", ignore_errors=True)
        row = {"decode": run("decode", root / "input"), "cold": run("check", root / "input")}
        row |= {"warm": run("check", root / "input")}
        assert row["cold"]["decoded"] and not row["warm"]["decoded"]
        results.append(row)
        say(f"round {k + 1} of {rounds}: " + ", ".join(f"{name} {r['seconds']:.2f} s" for name, r in row.items()))
    return results


def scale(n: int, root: Path) -> dict:
    """n entries: hard links to 500 small pictures, of which none is in both splits."""
    folders, sources = list(FOLDER_TO_LABEL), []
    (root / "small").mkdir(parents=True)
    for i in range(500):
        file = io.BytesIO()
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "JPEG")
        sources.append(root / "small" / f"{i}.jpg")
        sources[-1].write_bytes(file.getvalue())
    for split in ("train", "validation"):
        for folder in folders:
            (root / "input" / f"{split}_data" / folder).mkdir(parents=True)
    for i in range(n):
        split = "validation" if i % 5 == 0 else "train"
        folder = folders[i % 50 // 5]  # picture i % 500 is always in the same split and class
        os.link(sources[i % 500], root / "input" / f"{split}_data" / folder / f"{i}.jpg")
    cold, warm = run("build", root / "input"), run("load", root / "input")
    listed = run("list", root / "input")
    assert not warm["built"]
    search = run("search", root / str(n))
    shutil.rmtree(root)
    say(f"{n:,} entries: build {cold['seconds']:.1f} s, warm {warm['seconds']:.2f} s, {warm['peak_mib']:.0f} MiB")
    return {"n": n, "cold": cold, "warm": warm, "list": listed, "search": search}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def ratios(results, over, under, of="seconds") -> str:
    found = sorted(row[over][of] / row[under][of] for row in results if over in row)
    if len(found) == 1:
        return f"{found[0]:.1f}"
    return f"{statistics.median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f})"


MACHINE = (
    f"on {CORES} cores ({platform.machine()}), Python {platform.python_version()}, Pillow {Image.__version__}. The "
    "machine was shared: compare the ratios and the CPU times, not the seconds."
)


def pairs_report(pairs: list[dict], pictures: int) -> list[str]:
    median = {name: statistics.median(row[name]["seconds"] for row in pairs if name in row) for name in pairs[0]}
    search = statistics.median(row["cold"]["search"] for row in pairs)
    return [
        "# Checking the pictures: cost",
        "",
        f"`python benchmarks/picture_check.py` {MACHINE}",
        "",
        f"{pictures:,} JPEGs of 300x225, {len(pairs)} interleaved rounds, {CORES} processes.",
        "",
        "| step | seconds (median) |",
        "|---|---|",
        f"| decode only (Pillow, process pool) | {median['decode']:.2f} |",
        f"| `prepare()` cold: verdict, sizes, tokens, three hashes, search for duplicates | {median['cold']:.2f} |",
        f"| of it the search for duplicates | {search:.3f} |",
        f"| `prepare()` warm: nothing changed | {median['warm']:.3f} |",
        "",
        "| ratio | median (range over the rounds) |",
        "|---|---|",
        f"| cold / decode only | {ratios(pairs, 'cold', 'decode')} |",
        f"| cold / decode only, CPU time of all processes | {ratios(pairs, 'cold', 'decode', 'cpu')} |",
        f"| cold / warm | {ratios(pairs, 'cold', 'warm')} |",
    ]


def scale_report(sizes: list[dict]) -> list[str]:
    lines = [
        "# Checking the pictures: scale",
        "",
        f"`python benchmarks/picture_check.py --scale` {MACHINE}",
        "",
        "Hard links to 500 JPEGs of 16x16, a fifth of them held out. Build: the first `prepare()` with "
        "the decoding left out (the facts about the 500 are looked up). Warm: a fresh process that "
        "calls `prepare()` with nothing changed and `load_split()`, and reads 1,000 rows at random; its CPU time "
        "includes 1 s of imports. Listing: `os.scandir` and `stat` of the same files. Search: the search "
        "for duplicates alone on that many random hashes, 1 in 500 a near-copy. MiB: the main process.",
        "",
        "| entries | build, s | CPU s | MiB | warm, s | CPU s | MiB | listing, s | CPU s | search, s | MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sizes:
        cold, warm, search = row["cold"], row["warm"], row["search"]
        lines.append(
            f"| {row['n']:,} | {cold['seconds']:.1f} | {cold['cpu']:.1f} | {cold['peak_mib']:.0f} "
            f"| {warm['seconds']:.2f} | {warm['cpu']:.2f} | {warm['peak_mib']:.0f} "
            f"| {row['list']['seconds']:.2f} | {row['list']['cpu']:.2f} "
            f"| {search['seconds']:.2f} | {search['peak_mib']:.0f} |"
        )
    steps = [
        (b["warm"]["seconds"] - a["warm"]["seconds"]) / (b["n"] - a["n"]) * 1e6 for a, b in itertools.pairwise(sizes)
    ]
    if steps:
        each = ", ".join(f"{step:.1f}" for step in steps)
        lines += ["", f"From row to row the warm start grows by {each} µs per entry."]
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--pictures", type=int, default=14_308)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--scale", type=int, nargs="*", help="numbers of entries; alone: 10,000 100,000")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        return run_step(args.step, args.root)
    with tempfile.TemporaryDirectory(prefix="benchmark-data-") as folder:
        if args.scale is None:
            found = compare(args.pictures, args.rounds, Path(folder))
            name, lines = "picture_check.md", pairs_report(found, args.pictures)
        else:
            found = [scale(n, Path(folder) / "scale") for n in args.scale or (10_000, 100_000)]
            name, lines = "picture_check_scale.md", scale_report(found)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    say("\n".join(lines))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
