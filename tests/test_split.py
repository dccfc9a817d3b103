"""The cut: which pictures, that undoing it restores every byte and folder, also after kill -9 at random moments."""

import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout, suppress
from types import SimpleNamespace

import pytest
from PIL import Image

import data_process_utils
from animals.command import UserError
from animals.pictures import moves
from animals.pictures import split as data_split
from config import FOLDER_TO_LABEL, Config
from tests.helpers.pictures import CLASSES, command, drawn, run


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("original") / "input"
    for k, folder in enumerate(CLASSES):
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
    return shutil.copytree(original, tmp_path / "input")


def fingerprint(root) -> str:
    """Every folder, and every file with its content and, but for a manifest, its modification time."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        changed = path.suffix != ".json" and path.stat().st_mtime_ns
        content = (path.read_bytes(), changed) if path.is_file() else "folder"
        digest.update(f"{path.relative_to(root)} {content}\n".encode())
    return digest.hexdigest()


def arguments(tree, *more) -> list[str]:
    return command(Config(str(tree), str(tree.parent / "temp")), *map(str, more))


def call(tree, *more, program=data_process_utils):
    """The command within this process: .returncode, .stdout, .stderr."""
    said, complaints, code = io.StringIO(), io.StringIO(), 0
    if program is data_process_utils:
        more += ("--data_processes", "1", "--max_excluded", "0.5")
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(complaints):
        patch.setattr(sys, "argv", arguments(tree, *more)[1:])
        try:
            program.main()
        except UserError as error:
            code = 2
            print(error, file=sys.stderr)
    return SimpleNamespace(returncode=code, stdout=said.getvalue(), stderr=complaints.getvalue())


def succeed(*arguments, **options) -> str:
    """What the command prints where it succeeds."""
    done = call(*arguments, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def cut(tree, *more):
    return succeed(tree, "--validation_fraction", "0.2", *more)


def undo(tree):
    return succeed(tree, "--undo_split")


def refused(tree, *arguments, **options) -> str:
    """What the command says where it refuses and leaves everything as it is."""
    before, done = fingerprint(tree), call(tree, *arguments, **options)
    assert done.returncode == 2 and fingerprint(tree) == before
    return done.stderr


def held_out(tree, folder="validation_data") -> list[str]:
    return sorted(str(path.relative_to(tree / folder)) for path in (tree / folder).rglob("*") if path.is_file())


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
    (plan,) = json.loads((tree / "validation_split.json").read_text())["steps"]
    assert plan["seed"] == 42 and plan["fraction"] == 0.2 and "validation_data" in plan["created"]
    assert sorted(target for _, target in plan["moves"]) == [f"validation_data/{name}" for name in held_out(tree)]
    assert "13 pictures are back" in undo(tree)
    assert fingerprint(tree) == before


def test_the_seed_and_the_pixels_decide_and_not_the_names_or_their_order_on_the_disk(tree):
    def chosen(seed):
        cut(tree, "--seed", seed)
        result = contents(tree / "validation_data"), held_out(tree)
        undo(tree)
        return result

    first = chosen("1")
    assert chosen("1") == first and chosen("2")[1] != first[1]
    paths = [path for path in tree.rglob("*") if path.suffix in (".jpg", ".png")]
    random.Random(0).shuffle(paths)
    for i, path in enumerate(paths):
        path.rename(path.with_name(f"renamed{i:03}{path.suffix}"))
    assert chosen("1")[0] == first[0]


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
    names = [(f"cat/{i}", bytes([i]), i // 3, False) for i in range(30)]
    names += [(f"dog/{i}", bytes([100 + i]), 99, False) for i in range(2)]  # one group: cannot be divided
    chosen = data_split.choose(names, 0.25, 0)
    assert len(chosen) == 6  # of round(7.5) = 8: two groups of three
    assert chosen == data_split.choose(list(reversed(names)), 0.25, 0)
    held = [(*row[:3], row[0] == "cat/0") for row in names]
    assert {"cat/1", "cat/2"} <= set(data_split.choose(held, 0.01, 0))  # their near-duplicate is held out already
    assert data_split.choose([("cow/0", b"x", 0, False)], 0.5, 0) == []


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
    own = tree / "validation_data" / "cat"
    own.mkdir(parents=True)
    drawn(9999).save(own / "mine.jpg")
    before = fingerprint(tree)
    cut(tree, "--add_to_validation")
    undo(tree)
    assert fingerprint(tree) == before
    for i in range(20):
        drawn(8000 + i).save(own / f"{i:02}.jpg")
    said = refused(tree, "--validation_fraction", "0.5", "--add_to_validation")
    assert "names that pictures would be moved to" in said


@pytest.mark.parametrize("fraction", ["0", "1", "1.5", "-0.1", "nan"])
def test_a_fraction_that_is_none(tree, fraction):
    assert "expected a number from 0.001 to 0.999" in refused(tree, "--validation_fraction", fraction)


def test_linked_pictures_are_not_moved(tree):
    assert "nothing to undo" in refused(tree, "--undo_split")
    (tree / "train_data" / "cat").rename(tree.parent / "cats")
    (tree / "train_data" / "cat").symlink_to(tree.parent / "cats", target_is_directory=True)
    assert "symbolic links" in refused(tree, "--validation_fraction", "0.2")


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
    (line,) = refused(tree).splitlines()  # and none about folders that are empty for a while
    assert "interrupted" in line and "--undo_split" in line
    done = call(tree, "--validation_fraction", "0.2")
    assert done.returncode == 2 and "finished it (2 pictures)" in done.stderr
    assert "today's arguments were not used" in done.stderr and "--undo_split" in done.stderr
    assert held_out(tree) == names and not moves.interrupted(str(tree))


def killed(script, rng, *arguments):
    """Run a script whose moves are slowed down, and kill it among them, however slow the machine is."""
    slow = (
        "import sys, time, os\n"
        "from animals.pictures import moves\n"
        "rename, replace = os.rename, os.replace\n"
        "os.rename = lambda a, b: (time.sleep(0.004), rename(a, b), print('moved', flush=True))\n"
        "os.replace = lambda a, b: (time.sleep(0.01), replace(a, b))\n"
        "print('go', flush=True)\n"
    )
    words = [sys.executable, "-c", slow + script, *arguments]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        for _ in range(rng.randrange(1, 12)):  # "go", then a line per move
            process.stdout.readline()
        process.kill()


def test_kills_at_random_moments_lose_nothing(tree, request):
    """Cut and undo are killed in turn at random moments, then undone: the tree is as it was."""
    before, pictures = fingerprint(tree), contents(tree)
    manifest = tree / "validation_split.json"
    script = (  # the moves alone
        "tree, verb = sys.argv[1:3]\n"
        "names = sorted(f'{c}/{i:02}.jpg' for c in ('cat', 'dog', 'ragno') for i in range(0, 20, 2))\n"
        "names.append('cat/deep/er/1.png')\n"
        "pairs = [(f'train_data/{name}', f'validation_data/{name}') for name in names]\n"
        "if verb == 'undo': moves.undo(tree, 'cut')\n"
        "elif moves.interrupted(tree): moves.finish(tree, 'cut')\n"
        "else: moves.start(tree, 'cut', pairs, {'said': ''})\n"
    )
    rng, among_moves, kills = random.Random(0), 0, request.config.getoption("--kills")
    for k in range(4 * kills):
        verb = "cut" if not manifest.exists() or rng.random() < 0.3 and moves.interrupted(str(tree)) else "undo"
        killed(script, rng, tree, verb)
        among_moves += bool(moves.interrupted(str(tree)))
        assert contents(tree) == pictures, k  # no file lost, none in both places
        if k % 4 == 3:  # the next real run
            done = call(tree, "--undo_split")
            assert done.returncode == 0 or "nothing to undo" in done.stderr, k
            assert fingerprint(tree) == before, k
    assert among_moves >= kills


def test_the_real_command_killed_at_random_moments(tree):
    before, pictures = fingerprint(tree), contents(tree)
    rng = random.Random(1)
    for _ in range(4):
        with suppress(subprocess.TimeoutExpired):  # then it is killed
            run(arguments(tree, "--validation_fraction", "0.2", "--max_excluded", "0.5"), timeout=rng.uniform(0.3, 1.2))
        assert contents(tree) == pictures
        call(tree, "--undo_split")
        assert fingerprint(tree) == before
        assert not list(tree.glob("validation_split*"))


def test_a_broken_manifest_is_named(tree):
    (tree / "validation_split.json").write_text("{")
    with pytest.raises(UserError, match="validation_split.json"):
        moves.undo(str(tree), "cut")


def test_the_demos_pictures(tmp_path):
    """The drawn animals of the demo can be cut and put back to the byte."""
    tree, words = tmp_path / "input", ["--train", "20", "--validation", "1", "--test", "0"]
    subprocess.run([sys.executable, "demo/make_pictures.py", tree, *words], check=True)
    shutil.rmtree(tree / "validation_data")
    before = fingerprint(tree)
    cut(tree)
    counts = Counter(path.split("/")[0] for path in held_out(tree))
    assert set(counts) == set(FOLDER_TO_LABEL) and set(counts.values()) == {4}
    undo(tree)
    assert fingerprint(tree) == before and os.listdir(tree)
