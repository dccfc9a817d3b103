"""Two commands at once: one temp_dir for two sets of pictures, one input_dir whose pictures are moved and read."""

import subprocess
import sys
from dataclasses import replace

import pytest

from animals.command import UserError
from animals.files import folder_lock
from animals.pictures import prepare as data
from animals.pictures.cache import load_split
from animals.pictures.duplicates import known_duplicates
from tests.helpers.pictures import PNG, command, make_tree, run, train

SECOND = "import sys; sys.path.insert(0, '.'); from animals.command import run\n"


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
    summary = data.prepare(tree)["train"]
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
    pause = f"import {script} as it; real = it.{name}\n"
    pause += f"it.{name} = lambda *a: (real(*a), print('checked', flush=True), input())[0]\nrun(it.main)"
    words = [*command(tree, "--model_name_or_path", str(demo.checkpoint))[2:], "--logging_dir", f"{tmp_path}/logs"]
    flags = {"train": f"--output_dir {tmp_path}/out --train_parts projector --dry_run", "validation": ""}
    words += [*flags[script].split(), "--use_cpu"]
    first = subprocess.Popen(
        [sys.executable, "-c", SECOND + pause, *words],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    assert "checked\n" in iter(first.stdout.readline, "")
    pets = other_pictures(tree, tmp_path)
    second = run(command(pets))
    assert second.returncode == 0, second.stderr
    _, said = first.communicate("\n")
    (line,) = [line for line in said.splitlines() if line.startswith("error")]
    assert first.returncode == 2 and pets.input_dir in line and "--temp_dir of its own" in line, said
    assert "Traceback" not in said
