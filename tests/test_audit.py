"""The audit finds what was put in (flipped labels, an outlier, a crop), and features are kept by content."""

import csv
import hashlib
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from animals.pictures.read import PictureError, list_pictures
from animals.scoring import features as kept_features
from animals.scoring.features import features, load_tower
from config import Config
from scripts.audit import find_suspects


@pytest.fixture(scope="module")
def audited(run, demo, tmp_path_factory):
    """(root, names of the flipped pictures, output) for the demo's training pictures, 75 of them in a wrong folder."""
    root = tmp_path_factory.mktemp("audit")
    folders = list(Config().folder_to_label)
    pictures = [p for f in folders for p in sorted((demo.input / "train_data" / f).iterdir())]
    random = np.random.default_rng(0)
    flip = set(random.choice(len(pictures), 75, replace=False).tolist())
    for folder in folders:
        (root / "input" / "train_data" / folder).mkdir(parents=True)
    for i, path in enumerate(pictures):
        folder = path.parent.name
        if i in flip:
            folder = random.choice([f for f in folders if f != folder])
        (root / "input" / "train_data" / folder / f"{path.parent.name}-{path.name}").symlink_to(path)
    (root / "input" / "validation_data").symlink_to(demo.input / "validation_data")
    flags = f"--input_dir {root}/input --temp_dir {root}/temp --model_name_or_path {demo.model}"
    done = run(f"python scripts/audit.py {flags}", code=0)
    return root, {f"{pictures[i].parent.name}-{pictures[i].name}" for i in flip}, done.output


def test_flipped_labels_come_first(audited):
    root, flipped, output = audited
    with open(root / "temp" / "audit.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["image", "split", "label", "likely_label", "probability", "reason", "nearest"]
    assert sum(row["image"].rpartition("/")[2] in flipped for row in rows[:50]) >= 45
    reasons = [row["reason"] for row in rows]
    order = ["label", "outlier", "near-duplicate"]
    assert reasons == sorted(reasons, key=order.index) and len({row["image"] for row in rows}) == len(rows)
    assert all(row["likely_label"] != row["label"] for row in rows if row["reason"] == "label")
    assert f"suspects: label {reasons.count('label')}, outlier {reasons.count('outlier')}" in output
    right = [row["image"].rpartition("/")[2] in flipped for row in rows if row["reason"] == "label"]
    assert 0.3 < sum(right) / len(right) < 0.6, "disputed is not wrong"
    wrong = int(re.search(r"cleanlab estimates (\d+) wrong labels among 2,800, at most", output)[1])
    assert sum(right) < wrong < 2 * len(right)
    html = (root / "temp" / "audit.html").read_text(encoding="utf-8")
    assert "<script src" not in html and not re.search(r'(src|href)="(https?:)?//', html)
    assert "The label is disputed" in html and f"at most about {wrong} of the 2,800 labels are wrong" in html
    assert html.count("<li>") == len(rows) and html.count("data:image/jpeg") > len(rows)


def test_right_labels_are_disputed_too(audited, demo):
    """What the page says of its trial: with right labels all that is disputed is the classifier's mistake."""
    root, _, _ = audited
    paths = list_pictures(str(demo.input / "train_data"))
    rows = [{"image": path, "split": "train", "label": path.split("/")[-2]} for path in paths]
    sha = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths]
    known = features(load_tower(demo.model), paths, sha, Config(temp_dir=str(root / "temp")))  # the audit kept them
    suspects, wrong = find_suspects(known, rows, np.unique(sha, return_inverse=True)[1])
    disputed = [row["reason"] for row in suspects].count("label")
    assert 40 < disputed < 110 and 0.8 < wrong / disputed < 1.2


def test_features_are_kept_by_content(demo, tmp_path, monkeypatch):
    """A second call, another name and a second copy compute nothing; a picture that is gone is one line."""
    config = Config(temp_dir=str(tmp_path))
    paths = list_pictures(str(demo.input / "validation_data" / "cat"))[:6]
    tower, sha = load_tower(str(demo.model)), [str(i) for i in range(6)]
    monkeypatch.setattr(kept_features, "BLOCK", 4)
    first = features(tower, paths, sha, config, batch_size=2)
    assert len(list(tmp_path.glob("features/*/*.npz"))) == 2
    again = features(tower, [*paths[:5], "moved", "copy"], [*sha, sha[0]], config)
    assert np.array_equal(again, first[[0, 1, 2, 3, 4, 5, 0]])
    with pytest.raises(Exception, match="became unreadable after it was checked.*gone.jpg.*missing") as caught:
        features(tower, ["gone.jpg"], ["new"], config)
    assert type(caught.value).__name__ == "UserError" and not isinstance(caught.value, PictureError)
    assert load_tower(str(demo.checkpoint)).name != tower.name, "the demo trains the tower"
    shutil.copytree(demo.model, tmp_path / "copy")
    assert load_tower(str(tmp_path / "copy")).name == tower.name


def test_an_outlier_and_a_crop_are_suspects():
    random = np.random.default_rng(0)
    known = random.normal(size=(120, 16)).astype(np.float32)
    known[:60, 0] += 8
    known[7], known[80] = 40 * random.normal(size=16), known[90] + 0.001
    known[33] = known[44] + 0.001
    rows = [{"image": str(i), "split": "train", "label": "ab"[i >= 60]} for i in range(120)]
    group = np.arange(120)
    group[33] = group[44]  # the hashes know these two
    found = {row["image"]: (row["reason"], row["nearest"]) for row in find_suspects(known, rows, group)[0]}
    assert found["90"] == ("near-duplicate", "80") and "80" not in found and not {"33", "44"} & found.keys()
    assert "label" not in {reason for reason, _ in found.values()}


def test_too_few_pictures(run, demo, tmp_path):
    for split in ("train_data", "validation_data"):
        for folder in ("cat", "dog"):
            (tmp_path / split / folder).mkdir(parents=True)
            Image.new("RGB", (40, 40), folder == "cat" and "red" or "blue").save(tmp_path / split / folder / "1.png")
    flags = f"--input_dir {tmp_path} --temp_dir {tmp_path}/temp --model_name_or_path {demo.model}"
    done = run(f"python scripts/audit.py {flags}")
    assert done.code == 2 and f"error: {tmp_path}: found 4 pictures; expected at least 20" in done.output


def test_a_place_that_cannot_be_written_to_is_tried_first(run, tmp_path):
    (tmp_path / "file").write_text("")
    done = run(f"python scripts/audit.py --temp_dir {tmp_path}/file --model_name_or_path {tmp_path}/nowhere", code=2)
    assert done.output.startswith(f"error: --temp_dir {tmp_path}/file: found ") and len(done.output.splitlines()) == 1
