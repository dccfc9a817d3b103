"""The quarantine: lists as the other commands leave them, refusals, and every byte back, also after kill -9."""
# ruff: noqa: F401, F811  (fixtures of the cut's tests)

import csv
import os
import random
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

from animals.pictures import moves
from scripts import quarantine as program
from tests.helpers.pictures import CLASSES, drawn
from tests.test_split import call, contents, cut, fingerprint, held_out, killed, original, refused, succeed, tree, undo


def write_list(path, columns, rows) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def quarantine(tree, *arguments):
    return succeed(tree, *arguments, program=program)


def quarantined(tree) -> list[str]:
    return held_out(tree, "quarantine")


def hold_out(tree, folder, n, seed):
    (tree / "validation_data" / folder).mkdir(parents=True)
    for i in range(n):
        drawn(seed + i).save(tree / "validation_data" / folder / f"{i:02}.jpg")


def test_the_list_of_duplicates_as_it_is(tree):
    """Of copies in both splits all training pictures go, else the later one; the command of the error is enough."""
    for folder in CLASSES:
        hold_out(tree, folder, 11, 7000 + 100 * ord(folder[0]))
    train, held = tree / "train_data", tree / "validation_data"
    for copy in (held / "cat/00.jpg", held / "cat/z.jpg", train / "cat/copy.jpg", train / "ragno/other label.jpg"):
        shutil.copyfile(train / "cat/03.jpg", copy)
    shutil.copyfile(train / "dog/04.jpg", train / "ragno/z.jpg")
    before = fingerprint(tree)
    found = call(tree)
    command = re.search(r"\(python scripts/quarantine.py (--input_dir .*?)\)", found.stderr)[1].split()
    assert found.returncode == 2 and command[1] == str(tree) and len(command) == 3
    said = quarantine(tree, *command)
    gone = ["train/cat/03.jpg", "train/cat/copy.jpg", "train/ragno/other label.jpg", "train/ragno/z.jpg"]
    assert quarantined(tree) == gone and "4 pictures moved" in said
    assert "1 held-out pictures of the list stay where they are; --held_out_too moves" in said
    assert call(tree).returncode == 0
    assert "4 pictures are back" in quarantine(tree, "--undo")
    assert fingerprint(tree) == before


def test_held_out_pictures_go_only_when_that_is_asked_for(tree):
    """One held-out picture under two labels: the error names the flag; the same list may be given twice."""
    hold_out(tree, "cat", 11, 7000)
    hold_out(tree, "dog", 10, 8000)
    shutil.copyfile(tree / "validation_data/cat/05.jpg", tree / "validation_data/dog/z.jpg")
    listed = tree.parent / "temp" / "duplicates.csv"
    assert f"{listed} --held_out_too)" in refused(tree)
    with open(listed, "a", encoding="utf-8") as file:
        file.write(f"one split,near,2,{tree}/train_data/cat/05.jpg,train,cat,{tree}/train_data/cat/04.jpg,train,cat\n")
    said = quarantine(tree, listed)
    assert "1 held-out pictures of the list stay" in said and quarantined(tree) == ["train/cat/05.jpg"]
    said = quarantine(tree, listed)
    assert "0 pictures moved" in said and "take it back" not in said
    said = quarantine(tree, listed, "--held_out_too")
    assert "1 pictures moved" in said and "stay" not in said
    assert quarantined(tree) == ["train/cat/05.jpg", "validation/dog/z.jpg"] and call(tree).returncode == 0


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_list_as_a_spreadsheet_saves_it(tree, encoding, delimiter):
    shutil.copyfile(tree / "train_data/dog/00.jpg", tree / "train_data/dog/-ä=.jpg")
    rows = [["split", " Image ", ""], ["train", f"{tree}/train_data/dog/-ä=.jpg", "", ""], ["", "", "", ""]]
    with open(tree.parent / "list.csv", "w", encoding=encoding, newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    assert "1 pictures moved" in quarantine(tree, tree.parent / "list.csv")
    assert quarantined(tree) == ["train/dog/-ä=.jpg"]


def test_an_input_folder_that_cannot_be_written_to(tree):
    (tree.parent / "file").write_text("")
    done = call(tree, tree.parent / "list.csv", "--input_dir", tree.parent / "file", program=program)
    assert done.returncode == 2 and done.stderr.startswith(f"--input_dir {tree.parent}/file: found ")


def test_the_audits_list_one_call_at_a_time_and_the_cut_after_it(tree):
    before = fingerprint(tree)
    columns = ["image", "split", "label", "likely_label", "probability", "reason", "nearest"]
    names = ["cat/deep/er/1.png", "cat/05.jpg"]
    rows = [[os.path.relpath(tree / "train_data" / name), "train", "cat", "dog", 0.9, "label", "x"] for name in names]
    quarantine(tree, write_list(tree.parent / "audit.csv", columns, rows + rows[:1]))
    between = fingerprint(tree)
    cut(tree)
    held = held_out(tree)[0]
    mine = write_list(tree.parent / "mine.csv", ["image"], [[tree / "validation_data" / held]])
    quarantine(tree, mine, "--force", "--held_out_too")
    assert quarantined(tree) == ["train/cat/05.jpg", "train/cat/deep/er/1.png", f"validation/{held}"]
    said = refused(tree, "--undo_split")
    assert held in said and "scripts/quarantine.py" in said and "--undo" in said
    assert "1 earlier ones remain" in quarantine(tree, "--undo")
    undo(tree)
    assert fingerprint(tree) == between
    quarantine(tree, "--undo")
    assert fingerprint(tree) == before


@pytest.mark.parametrize(
    "columns, names, said",
    [
        (["image"], ["train_data/cat/00.jpg", "train_data/cat/nowhere.jpg"], "nowhere.jpg"),
        (["image"], ["train_data/cat"], "not pictures of a class"),
        (["image"], ["../elsewhere.jpg"], "not pictures of a class"),
        (["picture"], ["train_data/cat/00.jpg"], "found the columns picture"),
        (["image"], [f"train_data/dog/{i:02}.jpg" for i in range(3)], "3 of the 21 pictures of train_data/dog"),
    ],
)
def test_refusals_move_nothing(tree, columns, names, said):
    where = write_list(tree.parent / "list.csv", columns, [[tree / name] for name in names])
    assert said in refused(tree, where, program=program)
    if "dog" in said:
        quarantine(tree, where, "--force")
        assert len(quarantined(tree)) == 3
    else:
        assert "nowhere.csv" in refused(tree, tree.parent / "nowhere.csv", program=program)
        assert "nothing to undo" in refused(tree, "--undo", program=program)
        assert "not allowed with argument" in refused(tree, where, "--undo", program=program)


def test_kills_at_random_moments_lose_nothing(tree, request):
    before, pictures = fingerprint(tree), contents(tree)
    names = [f"{folder}/{i:02}.jpg" for folder in CLASSES for i in range(0, 20, 2)]
    where = write_list(tree.parent / "list.csv", ["image"], [[tree / "train_data" / name] for name in names])
    script = (
        "from config import Config\n"
        "from scripts import quarantine\n"
        "tree, verb, path = sys.argv[1:]\n"
        "if verb == 'undo': moves.undo(tree, 'quarantine')\n"
        "else: quarantine.quarantine(Config(input_dir=tree), path, True)\n"
    )
    rng, states = random.Random(2), Counter()
    for k in range(2 * request.config.getoption("--kills")):
        verb = "undo" if (tree / "quarantine.json").exists() else "quarantine"
        killed(script, rng, tree, verb, where)
        states[bool(moves.interrupted(str(tree)))] += 1
        assert contents(tree) == pictures, k
        if k % 2:
            if moves.interrupted(str(tree)) and rng.random() < 0.5:
                assert "a quarantine that was interrupted" in refused(tree)
                done = call(tree, where, program=program)
                assert done.returncode == 2 and "today's arguments were not used" in done.stderr
                assert len(quarantined(tree)) == len(names)
            call(tree, "--undo", program=program)
            assert fingerprint(tree) == before, k
    assert states[True]
