"""What stands around the class folders and how they are called: each message names the cause and the way out."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from animals.command import UserError
from animals.files import printable
from animals.pictures import prepare as data
from animals.training.preflight import check_output_dir
from config import Config
from tests.helpers.pictures import PNG, command, drawn, excluded, held, images, problems, run, train

APART, COMPOSED = "e\u0301cureuil", "\u00e9cureuil"  # the same word: NFD, as a Mac writes it, and NFC
NAME = "a\x1b[31m\nb"


def by_folders(tree) -> Config:
    return replace(tree, folder_to_label="folders")


def test_a_folder_too_many_around_the_classes(tree):
    moved = train(tree).rename(Path(tree.input_dir, "moved"))
    train(tree).mkdir()
    moved.rename(train(tree, "train_data"))
    (line,) = problems(tree)
    assert "train_data/train_data: found the class folders cat, dog, ragno in it" in line and "move them there" in line
    with pytest.raises(UserError, match=r"found one folder in .*train_data, train_data, and folders in it \(cat, dog"):
        by_folders(tree)


def test_the_splits_in_a_folder_of_their_own(tree):
    Path(tree.input_dir, "animals").mkdir()
    train(tree).rename(Path(tree.input_dir, "animals", "train_data"))
    way = f"train_data is in {tree.input_dir}/animals: give --input_dir {tree.input_dir}/animals"
    assert way in problems(tree)[0]
    shutil.rmtree(held(tree))
    with pytest.raises(UserError, match=way):
        by_folders(tree)


def test_a_name_that_a_mac_has_written(tree):
    train(tree, "cat").rename(train(tree, COMPOSED))
    held(tree, "cat").rename(held(tree, APART))
    (line,) = problems(by_folders(tree))
    assert "Unicode NFD and NFC" in line
    run(["sh", "-c", line.partition("the same ones; ")[2]])
    assert data.prepare(by_folders(tree))["validation"]["folders"][COMPOSED] == 2


def test_a_class_that_only_the_held_out_pictures_have(tree):
    shutil.copytree(held(tree, "cat"), held(tree, "lynx"))
    (line,) = problems(by_folders(tree))
    assert "validation_data/lynx: found a class that training does not have; expected one of cat, dog, ragno" in line
    assert str(train(tree, "lynx")) in line and "FOLDER_TO_LABEL" in problems(tree)[0]


@pytest.mark.parametrize("name", ["@eaDir", "__MACOSX", "$RECYCLE.BIN", "lost+found", ".thumbnails"])
def test_folders_of_the_system_are_no_classes_and_their_pictures_are_not_used(name, tree):
    for place in (train(tree, name), train(tree, "cat", name), held(tree, name)):
        place.mkdir()
        (place / "0.jpg").write_bytes(PNG)
    summary = data.prepare(by_folders(tree))["train"]
    assert summary["n"] == 12 and summary["ignored"] == {"hidden": 1} and len(summary["folders"]) == 3


def test_names_with_control_characters_reach_no_terminal_and_no_list(tree):
    drawn(3).save(train(tree, "cat", f"{NAME}.png"))
    done = run(command(tree, "--max_excluded", "1"))
    assert done.returncode == 0 and "name has control characters 1" in done.stderr and len(images(tree)) == 12
    assert excluded(tree) == {"a\\x1b[31m\\nb.png": "name has control characters"}
    assert "\x1b" not in done.stdout + done.stderr + Path(tree.temp_dir, "excluded.csv").read_text()
    train(tree, NAME).mkdir()
    for words in ((), ("--folder_to_label", "folders")):
        done = run(command(tree, *words))
        (line,) = done.stderr.splitlines()
        assert done.returncode == 2 and r"'a\x1b[31m\nb'" in line and "control characters; rename it" in line
    assert printable("écureuil \u200d\udcff") == "écureuil \u200d\\udcff"


def test_an_output_dir_that_deepspeed_takes_for_a_pattern(tmp_path):
    for name in ("out_[1]", "out*", "ou?"):
        with pytest.raises(UserError, match="expected none, because DeepSpeed"):
            check_output_dir(str(tmp_path / name))
    check_output_dir(str(tmp_path / "out {1}"))
