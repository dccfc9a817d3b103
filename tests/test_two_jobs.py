"""Two commands at once: one temp_dir for two sets of pictures, one input_dir whose pictures are moved and read."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from animals.command import UserError
from animals.files import folder_lock
from animals.pictures import prepare as data
from animals.pictures.cache import load_split, lock
from animals.pictures.duplicates import known_duplicates
from animals.pictures.moves import read_moves
from tests.helpers.pictures import PNG, command, held, make_tree, run, train


def started(words):
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def other_pictures(tree, tmp_path):
    """Another input_dir with the temp_dir of `tree`."""
    (tmp_path / "pets").mkdir()
    return replace(make_tree(tmp_path / "pets"), temp_dir=tree.temp_dir, data_processes=1)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_cache_that_another_command_has_rebuilt_is_not_read(tree, split, tmp_path):
    summaries = data.prepare(tree)
    pets = other_pictures(tree, tmp_path)
    data.prepare(pets)
    with pytest.raises(UserError) as error:
        load_split(tree, split)
    (line,) = str(error.value).splitlines()
    assert f"found the pictures '{pets.input_dir}/{split}_data'; expected '{tree.input_dir}/{split}_data'" in line
    assert "--temp_dir of its own" in line and len(load_split(pets, split)) and known_duplicates(tree) is None
    data.prepare(tree)
    assert len(load_split(tree, split)) == summaries[split]["n"]


def test_a_cache_of_other_words_or_of_another_day_is_not_read(tree):
    data.prepare(replace(tree, prompt="Which one? {labels}"))
    with pytest.raises(UserError, match="found the question 'Which one.*expected 'What animal"):
        load_split(tree, "train")
    summary = data.prepare(tree)["train"]
    train(tree, "cat", "new.png").write_bytes(PNG)
    with pytest.raises(UserError, match="found other files"):
        load_split(tree, "train")
    data.prepare(tree)  # another command's
    with pytest.raises(UserError, match="expected the one that was checked"):
        load_split(tree, "train", summary)
    assert len(load_split(tree, "train")) == 13


@pytest.mark.parametrize("script, name", [("train", "check_run"), ("validation", "check_inputs")])
def test_a_run_whose_cache_is_rebuilt_after_its_check_stops(script, name, tree, demo, tmp_path):
    """The real commands: the second one builds its cache between the first one's check and its reading."""
    data.prepare(tree)
    pause = f"import {script} as it; from animals.command import run; real = it.{name}\n"
    pause += f"it.{name} = lambda *a: (real(*a), print('checked', flush=True), input())[0]\nrun(it.main)"
    flags = f"--use_cpu --model_name_or_path {demo.checkpoint} --logging_dir {tmp_path}/logs"
    flags += f" --output_dir {tmp_path}/out --train_parts projector --dry_run" if script == "train" else ""
    words = command(tree, *flags.split())[2:]
    first = started([sys.executable, "-c", pause, *words])
    assert "checked\n" in iter(first.stdout.readline, "")
    pets = other_pictures(tree, tmp_path)
    second = run(command(pets))
    assert second.returncode == 0, second.stderr
    _, said = first.communicate("\n")
    (line,) = [line for line in said.splitlines() if line.startswith("error")]
    assert first.returncode == 2 and pets.input_dir in line and "--temp_dir of its own" in line, said
    assert "Traceback" not in said


def wait_for(process, text):
    """Read lines of stderr up to one that contains `text`."""
    assert any(text in line for line in iter(process.stderr.readline, "")), process.poll()


def cut_of(tree, temp):
    return command(replace(tree, temp_dir=str(temp)), "--validation_fraction", "0.3", "--add_to_validation")


@pytest.mark.parametrize("second", ["cut", "undo", "quarantine"])
def test_what_moves_pictures_waits_for_a_check_of_another_temp_dir(second, tree, tmp_path):
    """A check of the pictures stops in the middle; the second command waits until it has ended."""
    shutil.rmtree(held(tree))
    assert run(cut_of(tree, tmp_path / "temp2")).returncode == 0
    (tmp_path / "list.csv").write_text(f"image\n{next(train(tree, 'cat').iterdir())}\n")
    stop = "from animals.pictures import inspection as it, prepare; from config import Config\nreal = it.inspect_all\n"
    stop += "it.inspect_all = lambda *a: (print('decoding', flush=True), input(), real(*a))[2]\n"
    stop += f"print(prepare.prepare(Config({tree.input_dir!r}, {tree.temp_dir!r}, allow_leaks=True))['train']['n'])"
    first = started([sys.executable, "-c", stop])
    assert "decoding\n" in iter(first.stdout.readline, "")
    elsewhere = command(replace(tree, temp_dir=str(tmp_path / "temp2")))
    words = {"cut": cut_of(tree, tmp_path / "temp2"), "undo": [*elsewhere, "--undo_split"]}
    words["quarantine"] = [sys.executable, "scripts/quarantine.py", *elsewhere[2:], f"{tmp_path}/list.csv", "--force"]
    before = sorted(tmp_path.glob("input/*/*/*"))
    other = started(words[second])
    wait_for(other, f"waiting: another command uses {tree.input_dir}")
    assert sorted(tmp_path.glob("input/*/*/*")) == before and other.poll() is None
    assert first.communicate("\n\n")[0].split()[-1] == str(sum("train_data" in str(path) for path in before))
    assert other.communicate()[0] and other.returncode == 0
    assert sorted(tmp_path.glob("input/*/*/*")) != before


def test_two_cuts_of_one_folder_with_two_temp_dirs(tree, tmp_path):
    """Both wait for the same folder; then one after the other moves, and each can be taken back."""
    shutil.rmtree(held(tree))
    before = sorted(tmp_path.glob("input/**/*.jpg"))
    with folder_lock(tree.input_dir, shared=True):
        both = [started(cut_of(tree, tmp_path / name)) for name in ("temp1", "temp2")]
        for process in both:
            wait_for(process, "waiting: another command uses")
    assert [process.wait() for process in both] == [0, 0]
    steps = read_moves(tree.input_dir, "cut")["steps"]
    moved = [source for step in steps for source, _ in step["moves"]]
    assert len(steps) == 2 and len(set(moved)) == len(moved)
    assert len(list(tmp_path.glob("input/validation_data/*/*"))) == len(moved)
    for _ in steps:
        assert run(command(tree, "--undo_split")).returncode == 0
    assert sorted(tmp_path.glob("input/**/*.jpg")) == before


def test_a_second_command_says_that_it_waits_for_temp_dir(tree):
    with lock(tree):
        other = started(command(tree))
        wait_for(other, f"waiting: another command uses {tree.temp_dir}")
        assert not Path(tree.temp_dir, "train.json").exists()
    assert other.communicate()[0] and other.returncode == 0
