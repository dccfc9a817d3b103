"""The quarantine: lists as the other commands leave them, refusals, and every byte back, also after kill -9."""
# ruff: noqa: F401, F811  (fixtures of the cut's tests)

import csv
import os
import random
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


def test_the_list_of_duplicates_as_it_is(tree):
    """The held-out picture and the later one go; the next check finds nothing; undo restores every byte."""
    for folder in CLASSES:
        (tree / "validation_data" / folder).mkdir(parents=True)
        for i in range(11):
            drawn(7000 + 100 * ord(folder[0]) + i).save(tree / "validation_data" / folder / f"{i:02}.jpg")
    (tree / "validation_data" / "cat" / "00.jpg").write_bytes((tree / "train_data" / "cat" / "03.jpg").read_bytes())
    (tree / "train_data" / "ragno" / "z.jpg").write_bytes((tree / "train_data" / "dog" / "04.jpg").read_bytes())
    before = fingerprint(tree)
    found = call(tree)
    assert found.returncode == 2 and "scripts/quarantine.py" in found.stderr
    said = quarantine(tree, tree.parent / "temp" / "duplicates.csv")
    assert quarantined(tree) == ["train/ragno/z.jpg", "validation/cat/00.jpg"] and "2 pictures moved" in said
    assert call(tree).returncode == 0
    assert "2 pictures are back" in quarantine(tree, "--undo")
    assert fingerprint(tree) == before


def test_the_audits_list_one_call_at_a_time_and_the_cut_after_it(tree):
    before = fingerprint(tree)
    columns = ["image", "split", "label", "likely_label", "probability", "reason", "nearest"]
    names = ["cat/deep/er/1.png", "cat/05.jpg"]
    rows = [[os.path.relpath(tree / "train_data" / name), "train", "cat", "dog", 0.9, "label", "x"] for name in names]
    quarantine(tree, write_list(tree.parent / "audit.csv", columns, rows + rows[:1]))
    between = fingerprint(tree)
    cut(tree)
    held = held_out(tree)[0]
    quarantine(tree, write_list(tree.parent / "mine.csv", ["image"], [[tree / "validation_data" / held]]), "--force")
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
        with pytest.raises(SystemExit):  # they exclude each other
            call(tree, where, "--undo", program=program)


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
