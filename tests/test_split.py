"""The cut: which pictures, that undoing it restores every byte and folder, also after kill -9 at random moments."""

import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

import data_process_utils
from animals.command import UserError
from animals.pictures import moves
from animals.pictures import split as data_split
from config import FOLDER_TO_LABEL
from tests.helpers.pictures import drawn

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("cat", "dog", "ragno")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("original") / "input"
    for k, folder in enumerate(FOLDERS):
        (root / "train_data" / folder).mkdir(parents=True)
        for i in range(20):
            drawn(1000 * k + i).save(root / "train_data" / folder / f"{i:02}.jpg")
    (root / "train_data" / "cat" / "deep" / "er").mkdir(parents=True)
    for i in range(5):
        drawn(5000 + i).save(root / "train_data" / "cat" / "deep" / "er" / f"{i}.png")
    (root / "train_data" / "dog" / "notes.txt").write_text("stays")
    (root / "train_data" / "dog" / "bad.jpg").write_bytes(b"stays too")
    return root


@pytest.fixture
def tree(original, tmp_path):
    shutil.copytree(original, tmp_path / "input")
    return tmp_path / "input"


def fingerprint(root) -> str:
    """Every folder, and every file with its content and, but for a manifest, its modification time."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        changed = path.suffix != ".json" and path.stat().st_mtime_ns
        content = (path.read_bytes(), changed) if path.is_file() else "folder"
        digest.update(f"{path.relative_to(root)} {content}\n".encode())
    return digest.hexdigest()


def arguments(tree, *more, program=data_process_utils):
    flags = ["--input_dir", tree, "--temp_dir", tree.parent / "temp", *more]
    flags += ["--max_excluded", "0.5"] if program is data_process_utils else []
    return [sys.executable, program.__file__, *map(str, flags)]


def call(tree, *more, program=data_process_utils):
    """The command within this process: .returncode, .stdout, .stderr."""
    said, complaints, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(complaints):
        words = arguments(tree, *more, program=program)[1:]
        patch.setattr(sys, "argv", words + ["--data_processes", "1"] * (program is data_process_utils))
        try:
            program.main()
        except UserError as error:
            code = 2
            print(error, file=sys.stderr)
    return SimpleNamespace(returncode=code, stdout=said.getvalue(), stderr=complaints.getvalue())


def done_well(*arguments, **options) -> str:
    """What the command prints where it succeeds."""
    done = call(*arguments, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def cut(tree, *more):
    return done_well(tree, "--validation_fraction", "0.2", *more)


def undo(tree):
    return done_well(tree, "--undo_split")


def refused(tree, *arguments, **options) -> str:
    """What the command says where it refuses and leaves everything as it is."""
    before, done = fingerprint(tree), call(tree, *arguments, **options)
    assert done.returncode == 2 and fingerprint(tree) == before
    return done.stderr


def held_out(tree) -> list[str]:
    root = tree / "validation_data"
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def contents(tree) -> Counter:
    return Counter(path.read_bytes() for path in tree.rglob("*") if path.suffix in (".jpg", ".png"))


def test_the_cut_is_stratified_and_undone_to_the_byte(tree):
    before, all_pictures = fingerprint(tree), contents(tree)
    said = cut(tree, "--seed", "42")
    assert "13 of 65 pictures moved" in said and "--undo_split" in said
    assert Counter(path.split("/")[0] for path in held_out(tree)) == {"cat": 5, "dog": 4, "ragno": 4}
    assert contents(tree) == all_pictures  # nothing lost, nothing twice
    assert (tree / "train_data" / "dog" / "bad.jpg").exists() and (tree / "train_data" / "dog" / "notes.txt").exists()
    assert call(tree).returncode == 0  # both splits are ready for training
    assert "13 pictures are back" in undo(tree)
    assert fingerprint(tree) == before


def test_the_seed_decides(tree, tmp_path):
    cut(tree, "--seed", "1")
    first = held_out(tree)
    undo(tree)
    cut(tree, "--seed", "1")
    assert held_out(tree) == first
    undo(tree)
    cut(tree, "--seed", "2")
    assert held_out(tree) != first


def test_names_and_their_order_on_the_disk_do_not_matter(tree):
    cut(tree, "--seed", "1")
    chosen = contents(tree / "validation_data")
    undo(tree)
    paths = [path for path in tree.rglob("*") if path.suffix in (".jpg", ".png")]
    random.Random(0).shuffle(paths)
    for i, path in enumerate(paths):
        path.rename(path.with_name(f"renamed{i:03}{path.suffix}"))
    cut(tree, "--seed", "1")
    assert contents(tree / "validation_data") == chosen


def test_near_duplicates_stay_on_one_side(tree):
    for i in range(0, 20, 2):
        with Image.open(tree / "train_data" / "cat" / f"{i:02}.jpg") as picture:
            picture.save(tree / "train_data" / "cat" / f"{i:02}_again.jpg", quality=50)
            picture.save(tree / "train_data" / "cat" / f"{i:02}_same.png")
    cut(tree)
    cats, ends = {path for path in held_out(tree) if path.startswith("cat")}, (".jpg", "_again.jpg", "_same.png")
    assert cats and all(len({f"cat/{i:02}{end}" in cats for end in ends}) == 1 for i in range(0, 20, 2))
    done = call(tree)
    assert done.returncode == 0 and "both splits" not in done.stdout + done.stderr


def test_choose_takes_whole_groups_and_never_a_whole_class():
    names = [(f"cat/{i}", "cat", bytes([i]), i // 3, False) for i in range(30)]
    names += [(f"dog/{i}", "dog", bytes([100 + i]), 99, False) for i in range(2)]  # one group: cannot be divided
    chosen = data_split.choose(names, 0.25, 0)
    assert len(chosen) == 6  # of round(7.5) = 8: two groups of three
    assert chosen == data_split.choose(list(reversed(names)), 0.25, 0)
    held = [(*row[:4], row[0] == "cat/0") for row in names]
    assert {"cat/1", "cat/2"} <= set(data_split.choose(held, 0.01, 0))  # their near-duplicate is held out already
    alone = [("cow/0", "cow", b"x", 0, False)]
    assert data_split.choose(alone, 0.5, 0) == []


def test_a_second_cut_is_refused_unless_told_to_add(tree):
    before = fingerprint(tree)
    cut(tree)
    first = set(held_out(tree))
    said = refused(tree, "--validation_fraction", "0.2")
    assert "--add_to_validation" in said and "--undo_split" in said
    between = fingerprint(tree)
    cut(tree, "--add_to_validation", "--seed", "7")
    assert first < set(held_out(tree))
    assert "1 earlier ones remain" in undo(tree)  # one cut at a time, newest first
    assert set(held_out(tree)) == first and fingerprint(tree) == between
    undo(tree)
    assert fingerprint(tree) == before


def test_pictures_of_the_users_own_in_validation_stay(tree):
    (tree / "validation_data" / "cat").mkdir(parents=True)
    drawn(9999).save(tree / "validation_data" / "cat" / "mine.jpg")
    before = fingerprint(tree)
    refused(tree, "--validation_fraction", "0.2")
    cut(tree, "--add_to_validation")
    undo(tree)
    assert fingerprint(tree) == before


@pytest.mark.parametrize("fraction", ["0", "1", "1.5", "-0.1", "nan"])
def test_a_fraction_that_is_none(tree, fraction):
    assert "between 0 and 1" in refused(tree, "--validation_fraction", fraction)


def test_undo_without_a_cut(tree):
    assert "nothing to undo" in refused(tree, "--undo_split")


def test_linked_pictures_are_not_moved(tree):
    (tree / "train_data" / "cat").rename(tree.parent / "cats")
    (tree / "train_data" / "cat").symlink_to(tree.parent / "cats", target_is_directory=True)
    assert "symbolic links" in refused(tree, "--validation_fraction", "0.2")


def test_a_taken_name_refuses_before_the_first_move(tree):
    (tree / "validation_data" / "cat").mkdir(parents=True)
    for i in range(20):
        drawn(8000 + i).save(tree / "validation_data" / "cat" / f"{i:02}.jpg")
    said = refused(tree, "--validation_fraction", "0.5", "--add_to_validation")
    assert "names that pictures would be moved to" in said


def test_undo_never_overwrites_and_says_what_is_gone(tree):
    cut(tree)
    first, second = held_out(tree)[:2]
    (tree / "train_data" / first).write_bytes(b"a new picture")
    assert first in refused(tree, "--undo_split")
    (tree / "train_data" / first).unlink()
    (tree / "validation_data" / second).unlink()
    assert f"{second}: no longer there" in undo(tree)
    assert (tree / "train_data" / first).exists()


def test_an_interrupted_cut_stops_training_with_both_ways_out(tree):
    names = ["cat/00.jpg", "dog/01.jpg"]
    pairs = [(f"train_data/{name}", f"validation_data/{name}") for name in names]
    moves.start(str(tree), "cut", pairs, {"said": "2 pictures"})
    moves.write(str(tree), "cut", False, moves.read_moves(str(tree), "cut")["steps"])
    (tree / "validation_data" / "dog" / "01.jpg").rename(tree / "train_data" / "dog" / "01.jpg")
    said = refused(tree)
    assert "interrupted" in said and "--undo_split" in said
    done = call(tree, "--validation_fraction", "0.2")
    assert done.returncode == 2 and "finished it (2 pictures)" in done.stderr
    assert "today's arguments were not used" in done.stderr and "--undo_split" in done.stderr
    assert held_out(tree) == names and not moves.interrupted(str(tree))


def test_kills_at_random_moments_lose_nothing(tree, request):
    """Cut and undo are killed in turn at random moments, then undone: the tree is as it was."""
    before, pictures = fingerprint(tree), contents(tree)
    manifest = str(tree / "validation_split.json")
    script = (  # the moves alone, slowed down so that the kill lands among them
        "import sys, time, os\n"
        "from animals.pictures import moves\n"
        "rename, replace = os.rename, os.replace\n"
        "os.rename = lambda a, b: (time.sleep(0.004), rename(a, b))\n"
        "os.replace = lambda a, b: (time.sleep(0.01), replace(a, b))\n"
        "tree, verb = sys.argv[1:3]\n"
        "names = sorted(f'{c}/{i:02}.jpg' for c in ('cat', 'dog', 'ragno') for i in range(0, 20, 2))\n"
        "names.append('cat/deep/er/1.png')\n"
        "print('go', flush=True)\n"
        "pairs = [(f'train_data/{name}', f'validation_data/{name}') for name in names]\n"
        "if verb == 'undo': moves.undo(tree, 'cut')\n"
        "elif moves.interrupted(tree): moves.finish(tree, 'cut')\n"
        "else: moves.start(tree, 'cut', pairs, {'said': ''})\n"
    )
    rng, among_moves, kills = random.Random(0), 0, request.config.getoption("--kills")
    for k in range(4 * kills):
        verb = "cut" if not os.path.exists(manifest) or rng.random() < 0.3 and moves.interrupted(str(tree)) else "undo"
        process = subprocess.Popen(
            [sys.executable, "-c", script, tree, verb], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        process.stdout.readline()
        time.sleep(rng.uniform(0, 0.16))
        process.kill()
        process.communicate()
        among_moves += bool(moves.interrupted(str(tree)))
        assert contents(tree) == pictures, k  # no file lost, none in both places
        if k % 4 == 3:  # the next real run
            if any(tree.glob("validation_split.json")):
                undo(tree)
            else:
                call(tree, "--undo_split")
            assert fingerprint(tree) == before, k
    assert among_moves >= kills


def test_the_real_command_killed_at_random_moments(tree):
    before, pictures = fingerprint(tree), contents(tree)
    rng = random.Random(1)
    for _ in range(4):
        process = subprocess.Popen(
            arguments(tree, "--validation_fraction", "0.2"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(rng.uniform(0.3, 1.2))
        process.kill()
        process.wait()
        assert contents(tree) == pictures
        call(tree, "--undo_split")
        assert fingerprint(tree) == before
        assert not list(tree.glob("validation_split*"))


def test_a_broken_manifest_is_named(tree):
    (tree / "validation_split.json").write_text("{")
    with pytest.raises(UserError, match="validation_split.json"):
        moves.undo(str(tree), "cut")


def test_the_manifest_records_every_move(tree):
    cut(tree, "--seed", "3")
    (plan,) = json.loads((tree / "validation_split.json").read_text())["steps"]
    assert plan["seed"] == 3 and plan["fraction"] == 0.2
    assert sorted(target for _, target in plan["moves"]) == [f"validation_data/{name}" for name in held_out(tree)]
    assert "validation_data" in plan["created"]


def test_the_demos_pictures(tmp_path):
    """The drawn animals of the demo can be cut and put back to the byte."""
    script = ROOT / "demo" / "make_pictures.py"
    tree = tmp_path / "input"
    subprocess.run([sys.executable, script, tree, "--train", "20", "--validation", "1", "--test", "0"], check=True)
    shutil.rmtree(tree / "validation_data")
    before = fingerprint(tree)
    cut(tree)
    counts = Counter(path.split("/")[0] for path in held_out(tree))
    assert set(counts) == set(FOLDER_TO_LABEL) and set(counts.values()) == {4}
    undo(tree)
    assert fingerprint(tree) == before and os.listdir(tree)
