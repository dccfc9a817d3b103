"""The caches: their problems and rows, when they are stale, that two processes build them once, the pool's crashes."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from animals.checkpoint.tokens import image_token_count, read_geometry
from animals.pictures import cache, check, read
from animals.pictures import prepare as data
from animals.pictures.cache import load_split
from config import Config
from tests.helpers.pictures import (
    JPEG,
    PNG,
    ROOT,
    command,
    drawn,
    excluded,
    frames,
    grey16,
    half_transparent,
    held,
    images,
    problems,
    python,
    rotated,
    saved,
    train,
)


def test_an_empty_input_folder_says_what_to_do(tmp_path):
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "README.md").write_text("pictures go here")
    config = Config(input_dir=str(tmp_path / "input"), temp_dir=str(tmp_path / "temp"))
    first, second = problems(config)
    assert "train_data: not found" in first and "holds README.md" in first and "butterfly, cat" in first
    assert "https://" in first and "--input_dir" in first
    assert "validation_data: not found" in second and "--validation_fraction 0.2 --seed 42" in second
    done = command("--input_dir", config.input_dir, "--temp_dir", config.temp_dir)
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
    (line,) = problems(tree)
    assert line.startswith(str(train(tree, "dog"))) and "no usable picture" in line and "excluded.csv" in line
    (line,) = problems(tree)  # the second time too, from the cache
    assert "no usable picture" in line


def test_too_many_excluded_stops_with_the_list(tree):
    train(tree, "cat", "0.jpg").write_bytes(JPEG[:100])
    strict = Config(input_dir=tree.input_dir, temp_dir=tree.temp_dir)
    (line,) = problems(strict)
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
    with open(Path(tree.temp_dir) / "train.json", encoding="utf-8") as file:
        plain = json.load(file)
    assert len(rows) == len(plain) == 12
    assert plain[-1]["messages"] == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": tree.question}]},
        {"role": "assistant", "content": [{"type": "text", "text": "spider"}]},
    ]
    assert plain[-1]["images"] == [str(train(tree, "ragno", "3.jpg"))] and plain[-1]["label"] == "spider"
    from datasets import load_dataset

    others = load_dataset(
        "json", data_files=f"{tree.temp_dir}/train.json", split="train", cache_dir=f"{tree.temp_dir}/hf"
    )
    assert others.to_list() == plain
    for row, line in zip(rows, plain, strict=True):
        question, answer = row["messages"]
        assert question["content"][0] == {"type": "image", "text": None}  # Arrow has one type for all parts
        assert [question["content"][1], answer] == [line["messages"][0]["content"][1], line["messages"][1]]
        columns = ("images", "label", "width", "height", "image_tokens", "sha256")
        assert set(row) == {*columns, "messages"}  # what duplicates are found by does not reach the training
        assert all(row[column] == line[column] for column in columns)


def test_nothing_is_written_outside_temp(tree, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    before = sorted(os.walk(tree.input_dir))
    script = (
        "import sys; from animals.pictures import cache, prepare as p; from config import Config\n"
        "c = Config(input_dir=sys.argv[1], temp_dir=sys.argv[2])\n"
        "p.prepare(c); s = cache.load_split(c, 'train').map(lambda row: {'n': 1})\n"
        "print(len(s), 'torch' in sys.modules)"
    )
    others = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_"))}
    done = python(script, tree.input_dir, tree.temp_dir, env=others | {"HOME": str(home)})
    assert done.stdout.split()[0] == "12", done.stderr
    assert list(home.rglob("*")) == [] and sorted(os.walk(tree.input_dir)) == before


def test_check_inputs_says_all_problems_at_once_and_needs_no_torch(tree, tmp_path):
    shutil.copy(train(tree, "cat", "1.jpg"), held(tree, "cat", "copy.jpg"))
    script = (
        "import sys; from animals.pictures.prepare import check_inputs; from config import Config\n"
        "try: check_inputs(Config(input_dir=sys.argv[1], temp_dir=sys.argv[2]), sys.argv[3])\n"
        "except Exception as error: print(error, 'torch' in sys.modules, sep='\\n')"
    )
    said = python(script, tree.input_dir, tree.temp_dir, tmp_path / "model").stdout
    model, pictures, torch = said.splitlines()
    assert "found no config.json" in model and "identical pictures" in pictures and torch == "False"


def test_import_and_help_need_no_torch():
    script = (
        "import sys, data_process_utils; sys.argv = ['x', '--help']\n"
        "try: data_process_utils.main()\n"
        "except SystemExit: print(sorted({'torch', 'transformers', 'datasets', 'pyarrow', 'numpy'} & set(sys.modules)))"
    )
    done = python(script)
    assert done.stdout.splitlines()[-1] == "[]" and "--validation_fraction" in done.stdout


def test_flags_are_strict():
    both = ["--validation_fraction", "0.2", "--undo_split"]
    for arguments in (["--validation_frac", "0.2"], ["--nonsense"], ["--allow_leaks", "maybe"], both):
        assert command(*arguments).returncode == 2


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
    before, hashes = (
        data.prepare(tree),
        [[row[name] for name in cache.HASHES] for row in cache.read_rows(tree, "train")],
    )
    changed = Config(input_dir=tree.input_dir, temp_dir=tree.temp_dir, max_excluded=1.0, **change)
    after = data.prepare(changed)
    assert after["train"]["built"] and after["train"]["decoded"] == 0
    assert before["train"]["fingerprint"] != after["train"]["fingerprint"]
    assert text in (Path(tree.temp_dir) / "train.json").read_text()
    assert [[row[name] for name in cache.HASHES] for row in cache.read_rows(tree, "train")] == hashes
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
    train(tree, "cat", "new.avif").write_bytes(saved(drawn(7), "AVIF"))
    older = tuple(format for format in read.FORMATS if format != "AVIF")
    with monkeypatch.context() as patch:
        patch.setattr(check, "inspect_all", lambda paths, _: map(check.inspect, paths))  # in this process
        patch.setattr(read, "FORMATS", older)
        assert data.prepare(tree)["train"]["excluded"] == {"not a picture": 1}
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
        "import sys; from animals.pictures import cache, prepare as p; from config import Config\n"
        "s = p.prepare(Config(input_dir=sys.argv[1], temp_dir=sys.argv[2]))\n"
        "rows = cache.load_split(Config(temp_dir=sys.argv[2]), 'train')\n"
        "print(s['train']['built'], s['validation']['built'], len(rows))"
    )
    with ThreadPoolExecutor(4) as four:
        started = [four.submit(python, script, tree.input_dir, tree.temp_dir) for _ in range(4)]
    said = sorted(process.result().stdout.strip() for process in started)
    assert said == ["False False 12"] * 3 + ["True True 12"]


def test_killed_builds_leave_a_usable_state(tree):
    arguments = [sys.executable, ROOT / "data_process_utils.py", "--max_excluded", "1"]
    arguments += ["--input_dir", tree.input_dir, "--temp_dir", tree.temp_dir]
    rng = random.Random(0)
    for _ in range(4):
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.1, 0.8))
        process.kill()
        process.wait()
    assert data.prepare(tree)["train"]["n"] == 12
    assert len(load_split(tree, "train")) == 12 and not data.prepare(tree)["train"]["built"]


def mutated(rng, content: bytes) -> bytes:
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 5))):
        kind, at = rng.randrange(5), rng.randrange(max(len(content), 1))
        if kind == 0 and content:
            content[min(at, len(content) - 1)] = rng.randrange(256)
        elif kind == 1:
            del content[at:]
        elif kind == 2:
            del content[at : at + rng.randrange(1, 50)]
        elif kind == 3:
            content[at:at] = rng.randbytes(rng.randrange(1, 50))
        else:
            content[at % 64 : at % 64 + 4] = rng.randbytes(4)  # headers: sizes, offsets
    return bytes(content)


def test_fuzz_the_cache_never_promises_what_training_cannot_decode(tree):
    rng = random.Random(0)
    seeds = [saved(drawn(i, (40, 30)), f) for i, f in enumerate(("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF"))]
    seeds += [frames("GIF"), frames("WEBP"), rotated(), grey16(), half_transparent("P")]
    seeds.append(saved(drawn(9), "TIFF", compression="tiff_lzw"))
    for progressive in (False, True):  # large: decoded at half their size in training
        seeds.append(saved(drawn(7, (2048, 2020)), "JPEG", quality=5, progressive=progressive))
    for i in range(600):
        train(tree, "cat", f"fuzz{i:03}.jpg").write_bytes(mutated(rng, seeds[i % len(seeds)]))
    tree.allow_leaks = True  # some mutations change no pixel
    summary = data.prepare(tree)["train"]
    assert summary["n"] + sum(summary["excluded"].values()) == 612
    reasons, used = excluded(tree), {row["images"][0]: row for row in load_split(tree, "train")}
    assert min(len(reasons), len(used)) > 150
    for i in range(600):
        path = str(train(tree, "cat", f"fuzz{i:03}.jpg"))
        try:
            picture = read.load_picture(path)
        except read.PictureError as error:
            assert reasons[os.path.basename(path)] == str(error) and path not in used
        else:
            size = used[path]["width"], used[path]["height"]
            assert picture.mode == "RGB" and picture.size in (size, tuple(math.ceil(side / 2) for side in size))


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
    done = command(
        "--input_dir", tree.input_dir, "--temp_dir", tree.temp_dir, "--max_excluded", "0.5",
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert excluded(tree) == {"boom.jpg": "damaged: the decoder crashed"}
