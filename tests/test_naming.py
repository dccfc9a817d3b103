"""test.py: three guesses, unsure, a contact sheet, and going on where an interrupted run stopped."""

import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from animals.files import read_csv
from animals.pictures.read import list_pictures, load_picture
from animals.scoring.scorer import load_scorer
from config import Config
from tests.helpers import pictures as helpers

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
    """(path of the CSV, its rows, the flags) of one complete run."""
    output = tmp_path_factory.mktemp("named") / "names.csv"
    flags = f"{pictures} --model_name_or_path {demo.checkpoint} --per_device_eval_batch_size 2 --dtype float32"
    run(f"python test.py {flags} --output {output}", code=0)
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
    for row in (row for row in rows if row is not broken):
        order = sorted(LABELS, key=lambda label: -float(row[label]))
        assert [row["prediction"], row["top2"], row["top3"]] == order[:3]
        given = [row["probability"], row["top2_probability"], row["top3_probability"]]
        assert given == [row[label] for label in order[:3]]
        assert sum(float(row[label]) for label in LABELS) == pytest.approx(1, abs=1e-9)


def test_the_probability_of_all_labels_together(named, demo, run, tmp_path):
    """Near 1 after training, and small for a model that has not learned these labels: then `unsure`, if asked for."""
    _, rows, flags = named
    assert all(0.5 < float(row["labels_mass"]) <= 1 for row in rows if not row["error"])
    flags, output = flags.replace(str(demo.checkpoint), str(demo.model)), tmp_path / "names.csv"
    done = run(f"python test.py {flags} --output {output}", code=0)
    before, n = read(output), len(rows) - 1  # one is unreadable
    assert f"{n} of them have a labels_mass below 0.5: the model would rather answer something else" in done.output
    low = [float(row["labels_mass"]) for row in before if not row["error"]]
    assert len(low) == n and 0 < min(low) <= max(low) < 0.01
    scorer, model = load_scorer(str(demo.model), Config(), "float32")
    one = scorer.score(model, scorer.collate([load_picture(before[1]["image"])]))
    assert float(before[1]["labels_mass"]) == pytest.approx(one.exp().sum().item(), rel=1e-4)
    more = f"--output {output} --resume --html --language en --min_labels_mass {low[3]}"
    run(f"python test.py {flags} {more}", code=0)
    for row, same in zip(read(output), before, strict=True):
        sure = row["error"] or float(row["labels_mass"]) >= low[3]
        assert row == same | {"prediction": same["prediction"] if sure else "unsure"}
    assert "or all labels together have less than 0.0" in (tmp_path / "names.html").read_text(encoding="utf-8")


def test_interrupted_and_resumed_is_the_same(named, run, demo, tmp_path):
    """Killed in the middle, its last line cut: the rows stay, and --resume ends where a complete run ends."""
    complete, _, flags = named
    output = tmp_path / "names.csv"
    command = [sys.executable, "test.py", *flags.split(), "--output", str(output)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    while process.poll() is None and not (output.exists() and output.read_bytes().count(b"\n") > 3):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = output.read_bytes()
    assert complete.read_bytes().startswith(kept) and kept.count(b"\n") > 3
    output.write_bytes(kept[:-7])
    done = run(f"python test.py {flags} --output {output} --resume --html --min_probability 0.5", code=0)
    before = output.read_bytes()
    other = f"python test.py {flags.replace('float32', 'bfloat16')} --output {output} --resume"
    said = run(other, BF16_ON_CPU=1, code=2).output.splitlines()  # without it a CPU computes in float32, as before
    assert len(said) == 2 and "found answers of another checkpoint, dtype or prompt" in said[1]
    assert output.read_bytes() == before
    going_on = re.search(r"going on: .* has (\d+) pictures already", done.output)
    assert int(going_on[1]) == kept[:-7].count(b"\n") - 1
    rows, before = read(output), read(complete)
    for row, same in zip(rows, before, strict=True):
        sure = row["error"] or float(row["probability"]) >= 0.5
        assert row["prediction"] == (same["prediction"] if sure else "unsure")
        assert (row["image"], row["error"], row["top2"]) == (same["image"], same["error"], same["top2"])
        for label in LABELS:  # batches are cut elsewhere after --resume: float32 differs in the last digits
            assert float(row[label] or 0) == pytest.approx(float(same[label] or 0), abs=1e-5)
    sheet = (tmp_path / "names.html").read_text(encoding="utf-8")
    names = {"Look at these first", "unreadable", *(row["prediction"] for row in rows if not row["error"])}
    assert {re.sub("<.*", "", h).strip() for h in re.findall(r"<h2>(.*?)</h2>", sheet)} == names
    assert sheet.count("<img") == len(rows) - 1 + min(60, len(rows) - 1)


ODD = (b"caf\xe9.jpg", b"=1+1.jpg", b"-x.jpg", b"@x.jpg", b"'=x.jpg", b"two\nlines.jpg", b"red\x1b[31m.jpg", b"<b>.jpg")


def test_odd_names_odd_files_and_odd_labels(demo, pictures, tmp_path):
    """Every picture has a row, whatever its name; a spreadsheet runs none of them; --resume knows all of them."""
    checkpoint, place = tmp_path / "checkpoint", tmp_path / "pictures"
    checkpoint.mkdir()
    for path in demo.checkpoint.iterdir():
        (checkpoint / path.name).symlink_to(path)
    task = (checkpoint / "task.json").read_text(encoding="utf-8").replace('"cat": "cat"', '"cat": "=cat"')
    (checkpoint / "task.json").unlink()
    (checkpoint / "task.json").write_text(task, encoding="utf-8")
    (place / "folder").mkdir(parents=True)
    content = Path(list_pictures(str(pictures))[1]).read_bytes()
    for name in (*ODD, b"folder/no extension"):
        (place / os.fsdecode(name)).write_bytes(content)
    for name in ("phone.heic", "folder/phone", "folder/phone.HEIC"):
        (place / name).write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    for name in ("notes.txt", "LICENSE", "odd.\x1b[31m"):
        (place / "folder" / name).write_text("x")

    flags = ["--model_name_or_path", checkpoint, "--output", "names.csv", "--html", "--resume"]
    command = [sys.executable, Path("test.py").absolute(), *flags, "--", *ODD, "phone.heic", "folder"]
    said = helpers.run(command, cwd=place)
    assert said.returncode == 0 and "12 pictures, 3 unreadable" in said.stderr and "\x1b" not in said.stderr, said
    assert "no rows for files that are not pictures: .txt 1, no extension 1, others 1" in said.stderr
    columns, rows = read_csv(place / "names.csv")
    assert columns[-10:] == ["butterfly", "=cat", *LABELS[2:]]
    inside = ["folder/no extension", "folder/phone", "folder/phone.HEIC"]
    names = [name.decode(errors="backslashreplace").replace("\\xe9", "\\udce9") for name in ODD]
    assert [row["image"] for row in rows] == [*names, "phone.heic", *inside]
    assert {row["error"] for row in rows} == {"", "HEIC is not read: convert it to JPEG"}
    cells = {cell for row in read(place / "names.csv") for pair in row.items() for cell in pair}
    assert not [cell for cell in cells if cell[:1] in set("=+-@")]
    sheet = (place / "names.html").read_text(encoding="utf-8")
    assert "two\\nlines" in sheet and "red\\x1b[31m" in sheet and "caf\\udce9" in sheet and "&lt;b&gt;" in sheet
    assert 'href="caf%E9.jpg"' in sheet and "\x1b" not in sheet and sheet.count("<img") == 2 * 9
    before = (place / "names.csv").read_bytes()
    said = helpers.run(command, cwd=place)
    assert said.returncode == 0 and "has 12 pictures already\n" in said.stderr and "\n0 pictures, " in said.stderr, said
    assert (place / "names.csv").read_bytes() == before


MISTAKES = {  # flags -> what is said
    "{pictures} --min_probability 1.5": "--min_probability: found 1.5; expected a number from 0 to 1",
    "{pictures} --output {old} --resume": "--resume: found the columns image,prediction in {old}; expected image,",
    "{pictures} --output {old}/new.csv": "--output {old}/new.csv: {old} is not a folder that exists",
    "{pictures} --output {folder}": "--output {folder}: found a folder {folder}; expected the name of a file",
    "{pictures} --output {folder}.csv --html": "--output {folder}.csv: found a folder {folder}.html; expected",
    "{pictures} --output {folder}/": "--output {folder}/: found a folder",
    "{pictures} --output new.html --html": "--output new.html: found no name for a CSV",
    "{pictures} --output /proc/new.csv": "--output /proc: found /proc, where no file can be written",
    "{text}": "{text}: found no picture (.txt 1)",
    "no/such/folder": "no/such/folder (looked up as {here}/no/such/folder): not found; expected a picture or a folder",
}


@pytest.mark.parametrize(("flags", "message"), MISTAKES.items())
def test_mistakes_get_one_line(run, demo, pictures, tmp_path, flags, message):
    old = tmp_path / "old.csv"
    old.write_text("image,prediction\na.jpg,cat\n")
    for name in ("folder", "folder.html", "text"):
        (tmp_path / name).mkdir()
    (tmp_path / "text" / "notes.txt").write_text("x")
    places = {"old": old, "pictures": pictures, "folder": tmp_path / "folder", "text": tmp_path / "text"}
    flags, message = (text.format(here=os.getcwd(), **places) for text in (flags, message))
    done = run(f"python test.py --model_name_or_path {demo.checkpoint} --output {tmp_path}/new.csv {flags}")
    *said, error = done.output.splitlines()
    assert done.code == 2 and error.startswith(f"error: {message}")
    assert all("computing on the CPU" in line for line in said)  # --resume asks in which type
    assert old.read_text() == "image,prediction\na.jpg,cat\n" and not (tmp_path / "new.csv").exists()
