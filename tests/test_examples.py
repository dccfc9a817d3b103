"""--examples_per_class: which pictures a run trains on, and the learning curve that is drawn from such runs."""

import hashlib
import json

import pytest
from datasets import Dataset
from PIL import Image

from animals.files import read_json
from animals.training.batches import choose_examples
from tests.test_survive import command


def pictures(**classes):
    """A split with so many pictures of each class, whose contents differ."""
    rows = [
        (label, hashlib.sha256(f"{label} {i}".encode()).hexdigest()) for label, n in classes.items() for i in range(n)
    ]
    return Dataset.from_dict({"label": [label for label, _ in rows], "sha256": [sha for _, sha in rows]})


def chosen(data, per_class, seed=42, label=None):
    """The contents of the chosen pictures, of one class or of all."""
    return {row["sha256"] for row in choose_examples(data, per_class, seed) if label in (None, row["label"])}


def test_so_many_of_each_class_and_all_of_a_smaller_one():
    data = pictures(cat=40, dog=3, cow=9)
    found = choose_examples(data, 8, seed=42)
    assert {label: found["label"][:].count(label) for label in ("cat", "dog", "cow")} == {"cat": 8, "dog": 3, "cow": 8}
    assert len(set(found["sha256"])) == 19
    assert (
        choose_examples(data, 40, seed=42).to_list() == choose_examples(data, None, seed=42).to_list() == data.to_list()
    )


def test_a_larger_number_adds_pictures_and_the_seed_chooses_them():
    data = pictures(cat=40, dog=40)
    assert chosen(data, 4) < chosen(data, 5) < chosen(data, 16)
    assert chosen(data, 16) == chosen(data, 16) != chosen(data, 16, seed=43)
    places = [i for i, row in enumerate(data) if row["sha256"] in chosen(data, 16, label="cat")]
    assert places != list(range(16)), "not the first ones of the folder"


def test_new_pictures_and_classes_leave_the_order_of_the_others():
    before, after = pictures(cat=40, dog=40), pictures(ant=5, cat=40, dog=60)
    assert chosen(before, 8, label="cat") == chosen(after, 8, label="cat")
    old = set(before["sha256"])
    assert chosen(after, 20, label="dog") & old <= chosen(before, 20, label="dog")


@pytest.fixture(scope="module")
def trained(demo, run, tmp_path_factory):
    """A run on two pictures of each class for one epoch: its folder, its output, its command without their number."""
    out = tmp_path_factory.mktemp("few") / "sft"
    words = command(demo, out, "--num_train_epochs 1 --max_steps -1 --examples_per_class")
    return out, run(f"{words} 2", code=0).output, words


def test_a_run_on_some_pictures_says_so_and_is_resumed_with_the_same(demo, run, trained):
    out, output, words = trained
    n = len(json.loads((demo.cache / "train.json").read_text()))
    assert f"pictures        20 of {n} to train on; 300 held out\n" in output
    assert "steps           3 per epoch x 1 epochs = 3\n" in output and (out / "checkpoint-3").is_dir()
    assert read_json(out / "run.json")["pictures"] == 20
    done = run(f"{words} 3", code=2)
    assert "examples_per_class was 2, is 3 (the run would go on with other pictures)" in done.output
    assert "is the last step: nothing is left to train" in run(f"{words} 2", code=0).output


def test_the_learning_curve(demo, run, trained, tmp_path):
    few = trained[0]
    flags = f"--model_name_or_path {few} --input_dir {demo.input} --temp_dir {demo.cache} --logging_dir {tmp_path}"
    run(f"sh validation.sh {flags} --report_dir {tmp_path}", code=0)
    reports = [demo.root / "logs" / "validation" / "sft-llava-demo", tmp_path / "sft"]
    curve, both = f"python scripts/learning_curve.py --output {tmp_path}/new/curve.png", " ".join(map(str, reports))
    done = run(f"{curve} {both}", code=0)
    lines = (tmp_path / "new" / "curve.md").read_text().splitlines()
    assert done.output.splitlines()[: len(lines)] == lines
    rows = [line.strip("| ").split(" | ") for line in lines[2:]]
    n = read_json(demo.checkpoint / "run.json")["pictures"]
    assert [row[:3] for row in rows] == [["20", "2", "42"], [str(n), "all", "42"]]
    for row, report in zip(rows, reversed(reports), strict=True):
        assert row[3] == row[6] == f"{read_json(report / 'report.json')['accuracy']:.3f}"
    with Image.open(tmp_path / "new" / "curve.png") as image:
        assert image.width > 400 and len(image.convert("RGB").getcolors(1 << 20)) > 10
    (few / "run.json").rename(few / "other.json")
    done = run(f"{curve} {both}", code=2)
    assert f"error: {few}/run.json: found no number of training pictures; expected the run.json" in done.output
    (few / "other.json").rename(few / "run.json")
    assert (
        "found .pdf; expected a name that ends with .png" in run(f"{curve.replace('png', 'pdf')} {few}", code=2).output
    )
