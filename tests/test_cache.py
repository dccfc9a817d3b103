"""The caches: their problems and rows, when they are stale, that two processes build them once, the pool's crashes."""

import json
import os
import random
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from animals.checkpoint.image_tokens import image_token_count, read_geometry
from animals.command import UserError
from animals.pictures import cache, inspection, read
from animals.pictures import prepare as data
from animals.pictures.cache import load_split
from config import Config
from tests.helpers.pictures import JPEG, PNG, command, drawn, excluded, held, images, problems, python, run, train


def test_an_empty_input_folder_says_what_to_do(tmp_path):
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "README.md").write_text("pictures go here")
    config = Config(str(tmp_path / "input"), str(tmp_path / "temp"))
    first, second = problems(config)
    assert "train_data: not found" in first and "holds README.md" in first and "butterfly, cat" in first
    assert "https://" in first and "--input_dir" in first
    assert "validation_data: not found" in second and "--validation_fraction 0.2 --seed 42" in second
    done = run(command(config))
    assert done.returncode == 2 and done.stderr.splitlines() == [f"error: {first}", f"error: {second}"]
    assert not os.path.exists(config.temp_dir)


def test_all_problems_of_the_folders_are_one_error(tree):
    train(tree, "lynx").mkdir()
    held(tree, "cow").mkdir()
    held(tree, "cow", "notes.txt").write_text("x")
    unknown, empty = problems(tree)
    assert unknown.startswith(str(train(tree, "lynx"))) and "butterfly, cat, chicken" in unknown
    assert empty.startswith(str(held(tree, "cow"))) and "found no picture (.txt 1)" in empty


def test_a_class_without_a_usable_picture_is_an_error(tree):
    for path in train(tree, "dog").iterdir():
        path.write_bytes(JPEG[:100])
    for _ in range(2):  # the second time from the cache
        (line,) = problems(tree)
        assert line.startswith(str(train(tree, "dog"))) and "no usable picture" in line and "excluded.csv" in line


def test_too_many_excluded_stops_with_the_list(tree):
    train(tree, "cat", "0.jpg").write_bytes(JPEG[:100])
    (line,) = problems(Config(tree.input_dir, tree.temp_dir))
    assert "1 of 12 pictures unusable (not a picture 1)" in line or "1 of 12 pictures unusable (truncated 1)" in line
    assert str(Path(tree.temp_dir) / "excluded.csv") in line and list(excluded(tree)) == ["0.jpg"]
    assert data.prepare(tree)["train"]["n"] == 11


def test_a_class_of_the_table_without_folder_is_a_warning(tree):
    summary = data.prepare(tree)["train"]
    (line,) = summary["warnings"]
    assert "butterfly, chicken, cow" in line
    assert list(summary["classes"])[0] == "butterfly" and summary["classes"]["butterfly"] == 0


def test_one_class_is_not_enough(tree):
    for folder in ("dog", "ragno"):
        shutil.rmtree(train(tree, folder))
    (line,) = problems(tree)
    assert "found 1 class folders (cat); expected at least two" in line


def test_rows(tree):
    data.prepare(tree)
    rows = load_split(tree, "train")
    plain = json.loads(Path(tree.temp_dir, "train.json").read_text(encoding="utf-8"))
    assert len(rows) == len(plain) == 12
    assert plain[-1]["messages"] == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": tree.question}]},
        {"role": "assistant", "content": [{"type": "text", "text": "spider"}]},
    ]
    assert plain[-1]["images"] == [str(train(tree, "ragno", "3.jpg"))] and plain[-1]["label"] == "spider"
    from datasets import load_dataset

    places = {"data_files": f"{tree.temp_dir}/train.json", "cache_dir": f"{tree.temp_dir}/hf"}
    assert load_dataset("json", split="train", **places).to_list() == plain
    for row, line in zip(rows, plain, strict=True):
        question, answer = row["messages"]
        assert question["content"][0] == {"type": "image", "text": None}  # Arrow has one type for all parts
        assert [question["content"][1], answer] == [line["messages"][0]["content"][1], line["messages"][1]]
        columns = ("images", "label", "width", "height", "image_tokens", "sha256")
        assert set(row) == {*columns, "messages"}  # what duplicates are found by does not reach the training
        assert all(row[column] == line[column] for column in columns)


@pytest.mark.parametrize("name", ["t_[exp1]", "[!a]*", "a?b", "hf:", "x{1,2}", "a%20b#c", "a::b"])
def test_a_temp_dir_with_any_name(name, tree, tmp_path):
    """`datasets` takes paths for patterns and URLs."""
    tree.temp_dir = str(tmp_path / name / "temp")
    if "::" in name:
        with pytest.raises(UserError, match="found :: in its path"):
            data.prepare(tree)
        return
    data.prepare(tree)
    before = [row["label"] for row in load_split(tree, "train")]
    shutil.copy(train(tree, "cat", "0.jpg"), train(tree, "cat", "new.jpg"))
    data.prepare(tree)
    assert [row["label"] for row in load_split(tree, "train")] == ["cat", *before]


def test_nothing_is_written_outside_temp(tree, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    before = sorted(os.walk(tree.input_dir))
    script = "prepare.prepare(config); print(len(cache.load_split(config, 'train').map(lambda row: {'n': 1})))"
    others = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_"))}
    done = python(script, tree, env=others | {"HOME": str(home)})
    assert done.stdout.split()[0] == "12", done.stderr
    assert list(home.rglob("*")) == [] and sorted(os.walk(tree.input_dir)) == before


def test_check_inputs_says_all_problems_at_once_and_needs_no_torch(tree, tmp_path):
    shutil.copy(train(tree, "cat", "1.jpg"), held(tree, "cat", "copy.jpg"))
    script = (
        "try: prepare.check_inputs(config, sys.argv[1])\n"
        "except Exception as error: print(error, 'torch' in sys.modules, sep='\\n')"
    )
    model, pictures, torch = python(script, tree, tmp_path / "model").stdout.splitlines()
    assert "found no config.json" in model and "identical pictures" in pictures and torch == "False"


def test_import_and_help_need_no_torch():
    script = (
        "import sys, data_process_utils; sys.argv = ['x', '--help']\n"
        "try: data_process_utils.main()\n"
        "except SystemExit: print(sorted({'torch', 'transformers', 'datasets', 'pyarrow', 'numpy'} & set(sys.modules)))"
    )
    done = python(script)
    assert done.stdout.splitlines()[-1] == "[]" and "--validation_fraction" in done.stdout


def test_flags_are_strict(tree):
    for flags in ("--validation_frac .2", "--nonsense", "--allow_leaks maybe", "--validation_fraction .2 --undo_split"):
        done = run(command(tree, *flags.split()))
        assert done.returncode == 2 and "error: " in done.stderr and not os.path.exists(tree.temp_dir)


def test_an_unchanged_tree_is_not_read_again(tree):
    files = Path(tree.temp_dir)
    state = lambda: {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in files.iterdir()}  # noqa: E731
    assert data.prepare(tree)["train"]["built"]
    before = state()
    assert not data.prepare(tree)["train"]["built"] and state() == before


def test_a_changed_listing_decodes_everything_again(tree):
    data.prepare(tree)
    cat = train(tree, "cat")
    (cat / "new.png").write_bytes(PNG)
    summary = data.prepare(tree)
    assert (summary["train"]["n"], summary["train"]["decoded"]) == (13, 13) and not summary["validation"]["built"]
    (cat / "new.png").unlink()
    summary = data.prepare(tree)["train"]
    assert (summary["n"], summary["decoded"]) == (12, 12)
    old = (cat / "0.jpg").stat()
    content = bytearray((cat / "0.jpg").read_bytes())
    (cat / "0.jpg").unlink()
    (cat / "0.jpg").write_bytes(bytes(content[:100]) + bytes(len(content) - 100))  # same size, other content
    os.utime(cat / "0.jpg", ns=(old.st_atime_ns, old.st_mtime_ns))  # same time too
    summary = data.prepare(tree)["train"]
    assert (summary["n"], summary["decoded"]) == (11, 12)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"prompt": "Which animal? {labels}"}, "Which animal? butterfly"),
        ({"answer": "a {label}"}, '"a cat"'),
        ({"folder_to_label": {"dog": "hound", "cat": "cat", "ragno": "spider"}}, '"hound"'),
    ],
)
def test_another_wording_rewrites_the_rows_and_decodes_nothing(tree, change, text):
    hashes = lambda: [[row[name] for name in cache.HASHES] for row in cache.read_rows(tree, "train")]  # noqa: E731
    before, known = data.prepare(tree)["train"], hashes()
    changed = Config(tree.input_dir, tree.temp_dir, max_excluded=1.0, **change)
    after = data.prepare(changed)["train"]
    assert after["built"] and after["decoded"] == 0 and before["fingerprint"] != after["fingerprint"]
    assert text in Path(tree.temp_dir, "train.json").read_text() and hashes() == known
    assert load_split(changed, "train")[0]["messages"][0]["content"][1]["text"] == changed.question


def test_another_geometry_rewrites_the_counts_and_decodes_nothing(tree, tmp_path):
    before = data.prepare(tree)["train"]
    (tmp_path / "model").mkdir()
    tiny = {"vision_config": {"image_size": 48, "patch_size": 8}, "image_grid_pinpoints": [[48, 96], [96, 48]]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(tiny))
    after = data.prepare(tree, model_path=tmp_path / "model")["train"]
    assert after["decoded"] == 0 and after["image_tokens"] != before["image_tokens"]
    row = load_split(tree, "train")[0]
    assert row["image_tokens"] == image_token_count(64, 48, read_geometry(tmp_path / "model"))


def test_the_list_of_excluded_files_is_always_there(tree):
    train(tree, "cat", "0.jpg").write_bytes(b"no picture")
    data.prepare(tree)
    listed = Path(tree.temp_dir, "excluded.csv")
    before = listed.read_text()
    listed.unlink()
    assert data.prepare(tree, ("validation",))["validation"]["decoded"] == 0
    assert listed.read_text() == before and "cat/0.jpg,train,not a picture" in before


@pytest.mark.parametrize("name", ["train.json", "cache.json"])
@pytest.mark.parametrize("harm", ["removed", "cut short", "of another format"])
def test_a_harmed_cache_is_rebuilt(tree, name, harm):
    data.prepare(tree)
    path = Path(tree.temp_dir) / name
    content = path.read_text()
    path.unlink()
    harmed = {"cut short": content[:50], "of another format": content.replace(f'"[{cache.FORMAT},', '"[0,')}
    if harm in harmed:
        path.write_text(harmed[harm])
    summary = data.prepare(tree)["train"]
    assert summary["built"] and summary["decoded"] == 12
    assert len(json.loads((Path(tree.temp_dir) / "train.json").read_text())) == len(load_split(tree, "train")) == 12


def test_a_picture_excluded_for_its_format_is_looked_at_again_when_the_formats_change(tree, monkeypatch):
    drawn(7).save(train(tree, "cat", "new.avif"))
    older = tuple(format for format in read.FORMATS if format != "AVIF")
    with monkeypatch.context() as patch:
        patch.setattr(inspection, "inspect_all", lambda paths, _: map(inspection.inspect, paths))  # in this process
        patch.setattr(read, "FORMATS", older)
        assert data.prepare(tree)["train"]["excluded"] == {"AVIF": 1}
    assert data.prepare(tree)["train"]["excluded"] == {} and "train_data/cat/new.avif" in images(tree)


def test_a_picture_that_vanishes_after_the_check_is_an_error_that_names_it(tree):
    data.prepare(tree)
    path = load_split(tree, "train")[0]["images"][0]
    os.unlink(path)
    with pytest.raises(read.PictureError, match="missing"):
        read.load_picture(path)
    assert data.prepare(tree)["train"]["n"] == 11


def test_four_processes_at_once_build_once(tree):
    script = (
        "splits = prepare.prepare(config)\n"
        "print(*(split['built'] for split in splits.values()), len(cache.load_split(config, 'train')))"
    )
    with ThreadPoolExecutor(4) as four:
        said = sorted(done.stdout.strip() for done in four.map(lambda _: python(script, tree), range(4)))
    assert said == ["False False 12"] * 3 + ["True True 12"]


def test_killed_builds_leave_a_usable_state(tree):
    rng = random.Random(0)
    for _ in range(4):
        with suppress(subprocess.TimeoutExpired):  # then it is killed
            run(command(tree, "--max_excluded", "1"), timeout=rng.uniform(0.1, 0.8))
    assert data.prepare(tree)["train"]["n"] == 12
    assert len(load_split(tree, "train")) == 12 and not data.prepare(tree)["train"]["built"]


def test_a_decoder_that_crashes_costs_one_picture(tree, tmp_path):
    """The process dies on one picture; the others under way are asked again."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, PIL.Image\n"
        "real = PIL.Image.open\n"
        "def fatal(file, *a, **k):\n"
        "    if file.getbuffer()[:4] == b'BOOM': os._exit(1)\n"
        "    return real(file, *a, **k)\n"
        "PIL.Image.open = fatal\n"
    )
    train(tree, "dog", "boom.jpg").write_bytes(b"BOOM")
    done = run(command(tree, "--max_excluded", "0.5"), env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert excluded(tree) == {"boom.jpg": "damaged: the decoder crashed"}
