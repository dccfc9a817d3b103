"""Equal and similar pictures: which are found, which stop the build, what others are told of them."""

import csv
import itertools
import json
import os
import shutil
from pathlib import Path

import imagehash
import numpy as np
import pytest
from PIL import Image, ImageOps
from statsmodels.stats.proportion import proportion_confint

from animals.command import UserError, yes_or_no
from animals.pictures import duplicates as search
from animals.pictures import inspection, read
from animals.pictures import prepare as data
from animals.pictures.cache import fresh_entries, read_cache
from config import Config
from tests.helpers.browser import Browser, find_chromium
from tests.helpers.pictures import command, drawn, held, problems, run, train


def listed(config) -> list[tuple[str, str, str, str]]:
    """(problem, match, image, other image) of each row of duplicates.csv, paths below input_dir."""
    with open(Path(config.temp_dir) / "duplicates.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    below = lambda path: os.path.relpath(path, config.input_dir)  # noqa: E731
    return [(row["problem"], row["match"], below(row["image"]), below(row["other_image"])) for row in rows]


def described(config) -> list[str]:
    """The warnings, from what cache.json knows of the duplicates."""
    found = search.read_duplicates(config, fresh_entries(config, read_cache(config)))
    return search.describe_duplicates(config, found)


def near_copy(path, copy, quality=40, **options):
    """Save the picture at `path` again, compressed, perhaps in another size=(width, height)."""
    picture = read.load_picture(path)
    picture.resize(options.get("size", picture.size), Image.Resampling.BICUBIC).save(copy, quality=quality)


@pytest.mark.parametrize("name", ["copy.jpg", "copy.png"])
def test_the_same_pixels_in_both_splits_stop(tree, name):
    data.prepare(tree)
    assert listed(tree) == []
    shutil.copy(train(tree, "cat", "1.jpg"), held(tree, "cat", "copy.jpg"))
    if name == "copy.png":  # another format
        read.load_picture(held(tree, "cat", "copy.jpg")).save(held(tree, "cat", name))
        held(tree, "cat", "copy.jpg").unlink()
    for _ in range(2):  # built, then from the cache
        (line,) = problems(tree)
        assert "1 same pixels, both splits" in line and name in line and "--allow_leaks" in line
    assert listed(tree) == [("both splits", "same pixels", f"validation_data/cat/{name}", "train_data/cat/1.jpg")]
    tree.allow_leaks = True
    assert data.prepare(tree)["validation"]["n"] == 7


def test_one_picture_under_two_labels_stops(tree):
    shutil.copy(train(tree, "cat", "1.jpg"), train(tree, "dog", "copy.jpg"))
    (line,) = problems(tree)
    assert "1 same pixels, two labels" in line
    pair = "train_data/dog/copy.jpg", "train_data/cat/1.jpg"
    assert listed(tree) == [("two labels", "same pixels", *pair)]
    (line,) = problems(tree, splits=("train",))
    assert "two labels" in line and "duplicates.csv" in line
    data.prepare(tree, splits=("validation",))
    tree.folder_to_label = {"cat": "pet", "dog": "pet", "ragno": "spider"}  # two folders of one label: no conflict
    summary = data.prepare(tree)["train"]  # classified again, without decoding
    assert summary["classes"] == {"pet": 9, "spider": 4} and summary["decoded"] == 0
    assert listed(tree) == [("one split", "same pixels", *pair)]


def test_a_recompressed_copy_across_splits_warns(tree):
    near_copy(train(tree, "cat", "1.jpg"), held(tree, "cat", "small.jpg"))
    near_copy(train(tree, "cat", "1.jpg"), held(tree, "cat", "large.jpg"), 80, size=(128, 96))
    data.prepare(tree)
    assert described(tree)[0].startswith("warning: 2 near, both splits (")
    assert {(match, image, other) for problem, match, image, other in listed(tree) if problem == "both splits"} == {
        ("near", f"validation_data/cat/{name}", "train_data/cat/1.jpg") for name in ("small.jpg", "large.jpg")
    }
    done = run(command(tree))
    assert done.returncode == 0 and "2 near, both splits" in done.stdout + done.stderr


def test_every_kind_is_counted_and_three_pairs_are_shown(tree):
    for k in range(4):
        shutil.copy(train(tree, "cat", "1.jpg"), held(tree, "cat", f"copy {k}.jpg"))
    tree.allow_leaks = True
    data.prepare(tree)
    lines = described(tree)
    assert lines[0].startswith("warning: 4 same pixels, both splits (")
    assert lines[4].startswith("warning: 3 near, one split of validation (")
    assert lines[1].endswith(f"copy 0.jpg ~ {train(tree, 'cat', '1.jpg')}, 0 of 64 bits differ")


def test_flat_pictures_are_compared_by_pixels_only(tree):
    Image.new("RGB", (64, 48), "red").save(train(tree, "cat", "red.png"))
    Image.new("RGB", (64, 48), "blue").save(held(tree, "cat", "blue.png"))
    data.prepare(tree)
    assert listed(tree) == []


def searched(pictures, limit=10**6):
    """find_duplicates() on pictures of one label in train: (pairs, group)."""
    phash, mirrored, thumbnail = zip(*map(inspection.fingerprint, pictures), strict=True)
    zeros = np.zeros(len(phash), np.int8)
    thumbnail = np.frombuffer(b"".join(thumbnail), np.uint8).reshape(-1, 32, 32)
    hashes = np.array(phash, np.uint64), np.array(mirrored, np.uint64)
    names = [str(i) for i in range(len(phash))]
    described = search.Pictures(names, zeros, zeros, names, *hashes, thumbnail)
    found, group = search.find_duplicates(described, 8, limit)
    return {(pair.other, pair.row) for pair in found}, group


def test_copies_are_found_mirrored_ones_too():
    originals = [drawn(seed, (300, 225)) for seed in range(20)]
    n = len(originals)
    for change in (
        lambda p: p.resize((189, 142), Image.Resampling.LANCZOS),
        lambda p: p.resize((660, 495), Image.Resampling.LANCZOS),
        lambda p: ImageOps.mirror(p).resize((150, 112)),
    ):
        pairs, group = searched([*originals, *map(change, originals)])
        assert pairs == {(i, i + n) for i in range(n)} and (group[:n] == group[n:]).all()
    assert searched([*originals, *originals], limit=39)[0] == set()  # beyond the limit nothing is compared


def test_near_pairs_finds_what_comparing_all_pairs_finds(monkeypatch):
    """In many blocks, with the correlation of numpy beyond SURE bits and for mirrored pictures."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (3, 4), dtype=np.uint8))  # few shapes: many near each other
    pictures = []
    for _ in range(150):
        plain = np.asarray(small.resize((32, 32), Image.Resampling.BICUBIC)).astype(int)
        picture = Image.fromarray((plain + rng.integers(-60, 61, (32, 32))).clip(0, 255).astype(np.uint8))
        pictures.append(ImageOps.mirror(picture) if rng.random() < 0.3 else picture)
    thumb = [np.asarray(picture).astype(float) for picture in pictures]
    phash = [inspection.perceptual_hash(picture) for picture in pictures]
    mirrored = [inspection.perceptual_hash(ImageOps.mirror(picture)) for picture in pictures]
    rows = search.Pictures([], np.zeros(150), np.zeros(150), [], np.array(phash), np.array(mirrored), np.array(thumb))
    monkeypatch.setattr(search, "BLOCK", 1000)
    close = []  # (row, other, bits, bits below which that is enough, correlation)
    for i, j in itertools.combinations(range(150), 2):
        for other, flip, sure in ((phash, 1, 4), (mirrored, -1, -1)):
            bits = (phash[j] ^ other[i]).bit_count()
            if bits <= 16:
                close.append((j, i, bits, sure, np.corrcoef(thumb[j].ravel(), thumb[i][:, ::flip].ravel())[0, 1]))
    monkeypatch.setattr(search, "CORRELATION", np.median([pair[4] for pair in close]))
    for distance in (4, 8, 16):
        near = [pair for pair in close if pair[2] <= distance]
        expected = {tuple(pair[:3]) for pair in near if pair[2] <= pair[3] or pair[4] >= search.CORRELATION}
        found = {pair for block in search.near_pairs(rows, distance) for pair in zip(*map(list, block), strict=True)}
        assert found == expected and (distance < 16 or len(found) > 100)


def test_a_pair_may_be_a_problem_in_more_than_one_way(tree):
    """Near ones under two labels, across the splits and within a split; equal ones within a split. None stops."""
    near_copy(train(tree, "cat", "1.jpg"), train(tree, "dog", "z.jpg"))
    near_copy(train(tree, "cat", "1.jpg"), held(tree, "dog", "z.jpg"), 60, size=(128, 96))
    near_copy(held(tree, "cat", "0.jpg"), held(tree, "cat", "z.jpg"), 50)
    shutil.copy(train(tree, "ragno", "0.jpg"), train(tree, "ragno", "z.jpg"))
    data.prepare(tree)
    rows = listed(tree)
    (across,) = [row for row in rows if row[0] == "both splits"]
    assert across[3] in ("train_data/cat/1.jpg", "train_data/dog/z.jpg")
    assert set(rows) == {
        ("one split", "same pixels", "train_data/ragno/z.jpg", "train_data/ragno/0.jpg"),
        ("two labels", "near", "train_data/dog/z.jpg", "train_data/cat/1.jpg"),
        ("two labels", "near", "validation_data/dog/z.jpg", "train_data/cat/1.jpg"),
        ("both splits", "near", "validation_data/dog/z.jpg", across[3]),
        ("one split", "near", "validation_data/cat/z.jpg", "validation_data/cat/0.jpg"),
    }


def test_what_the_report_is_told(tree):
    shutil.copy(train(tree, "cat", "1.jpg"), held(tree, "cat", "copy.jpg"))
    near_copy(train(tree, "dog", "1.jpg"), held(tree, "dog", "near.jpg"))
    near_copy(held(tree, "dog", "0.jpg"), held(tree, "dog", "same side.jpg"))
    data.prepare(tree, splits=("validation",))
    assert search.known_duplicates(tree) is None  # nothing is known of train
    tree.allow_leaks = True
    data.prepare(tree, splits=("train",))
    tree.allow_leaks = False
    for _ in range(2):
        data.prepare(tree, splits=("validation",))  # alone it does not stop: the report says it
        known = search.known_duplicates(tree)
        assert known["identical"] == {str(held(tree, "cat", "copy.jpg"))}
        assert known["near_duplicates"] == {str(held(tree, "dog", "near.jpg"))}
        group = known["group"]
        assert sorted(group) == sorted(map(str, [*held(tree).rglob("*.jpg"), *train(tree).rglob("*.jpg")]))
        assert group[str(held(tree, "dog", "0.jpg"))] == group[str(held(tree, "dog", "same side.jpg"))]
        assert group[str(held(tree, "cat", "copy.jpg"))] == group[str(train(tree, "cat", "1.jpg"))]
        assert len({number for path, number in group.items() if "validation_data" in path}) == 8
        assert len(set(group.values())) == 12 + 6
        tree.prompt = "Which one? {labels}"  # another checkpoint's wording: the pictures are the same
    train(tree, "cat", "3.jpg").unlink()
    assert search.known_duplicates(tree) is None
    data.prepare(tree, splits=("validation",))
    assert search.known_duplicates(tree) is None


def test_more_pictures_than_the_limit_are_said(tree, capsys):
    near_copy(train(tree, "cat", "1.jpg"), held(tree, "cat", "near.jpg"))
    tree.near_duplicate_limit = 10
    data.prepare(tree)
    said = capsys.readouterr().err
    assert "near-duplicates were not searched" in said and "--near_duplicate_limit" in said and listed(tree) == []
    assert search.known_duplicates(tree) is None


def test_the_perceptual_hash_is_imagehashs():
    for seed in range(20):
        picture = drawn(seed, (300, 200))
        thumb = picture.convert("L").resize((32, 32), Image.Resampling.BILINEAR)
        found = inspection.fingerprint(picture)
        assert found[0] == int(str(imagehash.phash(thumb)), 16) and found[0].bit_count() == 32
        assert found[1] == int(str(imagehash.phash(ImageOps.mirror(thumb))), 16) and found[2] == thumb.tobytes()


def test_the_settings_are_checked():
    for name, value in (("max_excluded", 2.0), ("near_duplicate_distance", 17)):
        with pytest.raises(UserError, match=name):
            Config(**{name: value})
    assert yes_or_no("False") is False


def test_a_split_with_duplicates_says_so_where_its_accuracy_is_read(demo, run, tmp_path):
    """30 of 71 held-out pictures are training ones: 10 to the byte, 5 as PNG, 5 smaller, 10 compressed again."""
    for k, folder in enumerate(Config().folder_to_label):
        sides = {split: tmp_path / "input" / split / folder for split in ("train_data", "validation_data")}
        for split, n in (("train_data", 8), ("validation_data", 4 + (k == 0))):
            sides[split].mkdir(parents=True)
            for path in sorted((demo.input / split / folder).iterdir())[:n]:
                shutil.copy(path, sides[split])
        originals, held_out = sorted(sides["train_data"].iterdir()), sides["validation_data"]
        shutil.copy(originals[0], held_out / "copy.jpg")
        second = read.load_picture(originals[1])
        if k % 2:
            second.save(held_out / "copy.png")
        else:
            smaller = second.width * 3 // 4, second.height * 3 // 4
            near_copy(originals[1], held_out / "copy small.jpg", 90, size=smaller)
        near_copy(originals[2], held_out / "copy again.jpg")
    flags = f"--input_dir {tmp_path}/input --temp_dir {tmp_path}/temp --model_name_or_path {demo.checkpoint}"
    done = run(f"python data_process_utils.py {flags}")
    assert done.code == 2 and "15 same pixels, both splits" in done.output, done.output
    done = run(f"python data_process_utils.py {flags} --allow_leaks")
    assert done.code == 0, done.output
    done = run(f"sh validation.sh {flags} --report_dir {tmp_path}/r --logging_dir {tmp_path}/logs --language en")
    assert done.code == 0, done.output

    folder = tmp_path / "r" / demo.checkpoint.name
    with open(folder / "predictions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    clean = [row["correct"] == "True" for row in rows if not Path(row["image"]).name.startswith("copy")]
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    by_hand = sum(clean) / 41
    low, high = proportion_confint(sum(clean), 41, method="wilson")
    assert len(rows) == 71 and len(clean) == 41
    assert report["accuracy"] == sum(row["correct"] == "True" for row in rows) / 71
    counted = {"checked": True, "identical": 15, "near_duplicates": 15, "n_without": 41, "groups": 71}
    interval = pytest.approx([low, high])
    assert report["duplicates"] == counted | {"accuracy_without": by_hand, "accuracy_without_ci95": interval}
    said = "of the 71 pictures, 15 identical to a training picture and 15 near-duplicates of one; accuracy without them"
    assert f"{said} {by_hand:.4f} (95 % interval {low:.4f} to {high:.4f}, n = 41)" in done.output

    if not find_chromium():
        pytest.skip("no chromium on PATH (Debian: apt-get install chromium)")
    with Browser(tmp_path / "chromium") as browser:
        browser.view(1280, 800)
        browser.open((folder / "report.html").as_uri())
        warning = "document.querySelector('header .warning"
        sentence = browser.js(f"{warning}').innerText")
        box = browser.js(f"{warning}').getBoundingClientRect().toJSON()")
        shown = browser.js(f'{warning} [data-key="duplicates.accuracy_without"]\').value')
    said = "Held-out pictures that are identical to a training picture: 15; near-duplicates of one: 15"
    assert sentence.startswith(said)
    assert 0 < box["top"] < box["bottom"] <= 800 and 0 <= box["left"] < box["right"] <= 1280
    assert float(shown) == pytest.approx(by_hand)
