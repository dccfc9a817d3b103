"""test.py: three guesses, unsure, a contact sheet, sorted folders, and going on where an interrupted run stopped."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from animals.pictures.read import list_pictures, load_picture
from animals.scoring.sort import sort_into
from config import Config

LABELS = Config().labels


@pytest.fixture(scope="module")
def pictures(demo, tmp_path_factory):
    """A folder of unlabelled pictures, one of them broken."""
    folder = tmp_path_factory.mktemp("unlabelled")
    for i, path in enumerate(list_pictures(str(demo.input / "validation_data"))[::3]):
        load_picture(path).save(folder / f"{i:03}.jpg")
    (folder / "0 broken.jpg").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def named(run, demo, pictures, tmp_path_factory):
    """(its CSV, rows, standard flags) of one whole run."""
    output = tmp_path_factory.mktemp("named") / "names.csv"
    flags = f"{pictures} --model_name_or_path {demo.checkpoint} --per_device_eval_batch_size 2 --dtype float32"
    done = run(f"python test.py {flags} --output {output}")
    assert done.code == 0, done.output
    return output, read(output), flags


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_three_guesses(named, pictures):
    _, rows, _ = named
    assert list(rows[0])[:4] == ["image", "prediction", "probability", "error"] and list(rows[0])[-10:] == LABELS
    assert [row["image"] for row in rows] == list_pictures(str(pictures))
    [broken] = [row for row in rows if row["error"]]
    assert broken["image"].endswith("0 broken.jpg") and set(list(broken.values())[4:]) == {""}
    for row in rows:
        if row["error"]:
            continue
        order = sorted(LABELS, key=lambda label: -float(row[label]))
        assert [row["prediction"], row["top2"], row["top3"]] == order[:3]
        given = [row["probability"], row["top2_probability"], row["top3_probability"]]
        assert given == [row[label] for label in order[:3]]
        assert sum(float(row[label]) for label in LABELS) == pytest.approx(1, abs=1e-9)


def test_interrupted_and_resumed_is_the_same(named, run, demo, tmp_path):
    """Killed in the middle, its last line cut: the rows stay, and --resume ends where a whole run ends."""
    whole, _, flags = named
    output = tmp_path / "names.csv"
    command = [sys.executable, "test.py", *flags.split(), "--output", str(output)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    while process.poll() is None and not (output.exists() and output.read_bytes().count(b"\n") > 3):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = output.read_bytes()
    assert whole.read_bytes().startswith(kept) and kept.count(b"\n") > 3
    output.write_bytes(kept[:-7])
    done = run(f"python test.py {flags} --output {output} --resume --html --min_probability 0.5")
    assert done.code == 0, done.output
    before = output.read_bytes()
    done_again = run(f"python test.py {flags.replace('float32', 'bfloat16')} --output {output} --resume")
    assert (done_again.code, done_again.output.count("\n")) == (2, 1)
    assert "found answers of another checkpoint, dtype or prompt" in done_again.output
    assert output.read_bytes() == before
    going_on = re.search(r"going on: .* has (\d+) pictures already", done.output)
    assert int(going_on[1]) == kept[:-7].count(b"\n") - 1
    rows, before = read(output), read(whole)
    for row, same in zip(rows, before, strict=True):
        sure = row["error"] or float(row["probability"]) >= 0.5
        assert row["prediction"] == (same["prediction"] if sure else "unsure")
        assert (row["image"], row["error"], row["top2"]) == (same["image"], same["error"], same["top2"])
        for label in LABELS:  # batches are cut elsewhere after --resume: float32 differs in the last digits
            assert float(row[label] or 0) == pytest.approx(float(same[label] or 0), abs=1e-5)
    sheet = (tmp_path / "names.html").read_text(encoding="utf-8")
    names = {row["prediction"] for row in rows if not row["error"]}
    assert {re.sub("<.*", "", h).strip() for h in re.findall(r"<h2>(.*?)</h2>", sheet)} == names | {
        "Look at these first",
        "unreadable",
    }
    assert sheet.count("<img") == len(rows) - 1 + min(60, len(rows) - 1)


def tree(folder):
    """{path below: bytes} of every file."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def manifest(folder):
    return read(Path(folder) / "manifest.csv")


def test_sorted_into_folders(named, run, pictures, tmp_path):
    """Every picture once, as a link; again: nothing new; what the user moved stays, what was renamed follows."""
    whole, rows, flags = named
    output, folder = tmp_path / "names.csv", tmp_path / "sorted"
    output.write_bytes(whole.read_bytes())
    before = tree(pictures)
    done = run(f"python test.py {flags} --output {output} --resume --sort_into {folder}")
    assert done.code == 0 and f"{len(rows)} pictures sorted in" in done.output, done.output
    for row in rows:
        name = os.path.basename(row["image"])
        assert os.path.samefile(row["image"], folder / ("unreadable" if row["error"] else row["prediction"]) / name)
    first = tree(folder)
    assert len(first) == len(rows) + 1 == len(manifest(folder)) + 1
    sure = [row for row in rows if not row["error"]]
    moved, removed = sure[0], sure[1]
    there = folder / moved["prediction"] / os.path.basename(moved["image"])
    (folder / "elsewhere").mkdir()
    there.rename(folder / "elsewhere" / "mine.jpg")
    (folder / removed["prediction"] / os.path.basename(removed["image"])).unlink()
    after = tree(folder)
    done = run(f"python test.py {flags} --output {output} --resume --sort_into {folder} --min_probability 1")
    assert done.code == 0 and "2 stay where you have put them" in done.output, done.output
    unsure = {os.path.basename(row["image"]) for row in sure[2:]}
    assert set(os.listdir(folder / "unsure")) == unsure and len(tree(folder)) == len(after)
    assert (folder / "elsewhere" / "mine.jpg").exists() and not there.exists()
    assert tree(pictures) == before
    done = run(f"python test.py {flags} --output {output} --sort_into {pictures}/sorted")
    assert (done.code, done.output.count("\n")) == (2, 1) and "expected a folder outside" in done.output


def test_equal_names_and_no_hard_links(tmp_path, monkeypatch):
    rows = []
    for name in ("a/1.jpg", "b/1.jpg", "c/1.jpg", "d/2.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"same" if name < "c" else name.encode())
        rows.append({"image": str(tmp_path / name), "prediction": "cat", "probability": 0.5, "error": ""})
    (tmp_path / "link.jpg").symlink_to("d/2.jpg")
    rows.append(rows[0] | {"image": str(tmp_path / "gone.jpg")})
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(18, "Invalid cross-device link")))
    out = tmp_path / "sorted"
    assert sort_into(out, rows) == {"new": 4, "gone": 1}
    assert set(os.listdir(out / "cat")) == {"1.jpg", "1-2.jpg", "1-3.jpg", "2.jpg"}
    assert not (out / "cat" / "1.jpg").samefile(tmp_path / "a/1.jpg")
    assert sort_into(out, rows) == {"there": 4, "gone": 1}
    linked = rows[3] | {"image": str(tmp_path / "link.jpg")}  # a symbolic link is what it points to
    assert sort_into(out, [linked]) == {"there": 1}


def test_sorting_killed_again_and_again(named, tmp_path):
    """At random moments: the end is what an uninterrupted run leaves."""
    rows = [row | {"image": os.path.abspath(row["image"])} for row in named[1]]
    rows = [row | {"probability": str(k)} for k in range(20) for row in rows[k:] + rows[:k]]  # 20 names a picture: once
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    sort_into(tmp_path / "whole", rows)
    code = "import json, sys; from animals.scoring.sort import sort_into; print(flush=True)\n"
    code += "sort_into(sys.argv[2], json.load(open(sys.argv[1])))"
    command = [sys.executable, "-c", code, str(tmp_path / "rows.json"), str(tmp_path / "killed")]
    for k in range(8):
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(0.002 * 2**k / 8)
        process.send_signal(signal.SIGKILL)
        process.wait()
    sort_into(tmp_path / "killed", rows)
    whole, killed = tree(tmp_path / "whole"), tree(tmp_path / "killed")
    assert whole.keys() == killed.keys() and len(whole) == len(named[1]) + 1
    assert {row["file"] for row in manifest(tmp_path / "killed")} == whole.keys() - {"manifest.csv"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("{pictures} --min_probability 1.5", "error: --min_probability: found 1.5; expected a number from 0 to 1"),
        (
            "{pictures} --output {old} --resume",
            "error: --resume: found the columns image,prediction in {old}; expected image,",
        ),
        ("{pictures} --sort_into {old}", "error: --sort_into {old}: found File exists; expected a folder"),
        ("--serve --html", "error: --serve: found --html, --resume or --sort_into beside it; expected it alone"),
        ("no/such/folder", "error: no/such/folder: not found; expected a picture or a folder of pictures"),
    ],
)
def test_mistakes_get_one_line(run, demo, pictures, tmp_path, flags, message):
    old = tmp_path / "old.csv"
    old.write_text("image,prediction\na.jpg,cat\n")
    flags, message = flags.format(old=old, pictures=pictures), message.format(old=old)
    done = run(f"python test.py --model_name_or_path {demo.checkpoint} --output {tmp_path}/new.csv {flags}")
    assert (done.code, done.output.count("\n")) == (2, 1)
    assert done.output.startswith(message)
    assert old.read_text() == "image,prediction\na.jpg,cat\n" and not (tmp_path / "new.csv").exists()
