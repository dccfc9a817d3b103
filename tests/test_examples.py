"""Which pictures a run trains on (--examples_per_class), the learning curve, how much each counts (--class_weights)."""

import hashlib
import json
import shutil

import pytest
from datasets import Dataset
from PIL import Image

from animals.checkpoint.load import load_model, load_processor
from animals.checkpoint.task import settings_for
from animals.files import read_json
from animals.scoring.scorer import Scorer, score_pictures
from animals.training.batches import balanced_weights, choose_examples
from config import Config
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


@pytest.fixture(scope="module")
def unlike(demo, tmp_path_factory):
    """Twelve cats, three dogs and three spiders of the demo to train on, its held-out pictures beside them."""
    root = tmp_path_factory.mktemp("unlike")
    (root / "validation_data").symlink_to(demo.input / "validation_data")
    for folder, count in (("cat", 12), ("dog", 3), ("ragno", 3)):
        (root / "train_data" / folder).mkdir(parents=True)
        for file in sorted((demo.input / "train_data" / folder).iterdir())[:count]:
            shutil.copy(file, root / "train_data" / folder)
    return root


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_loss_is_that_of_weighted_classes(demo, run, tmp_path, unlike, ranks):
    """All pictures in one step: the logged loss is the weighted mean that the scorer's log-probabilities give."""
    labels = ["cat"] * 12 + ["dog"] * 3 + ["spider"] * 3
    weights = balanced_weights(labels)
    assert weights == {"cat": 0.5, "dog": 2.0, "spider": 2.0}
    folders = f"--input_dir {unlike} --temp_dir {tmp_path}/cache --logging_dir {tmp_path}/logs"
    flags = f"--class_weights balanced --per_device_train_batch_size {6 // ranks} --gradient_accumulation_steps 3 "
    flags += "--max_steps 1 --eval_strategy no --eval_on_start False --save_steps 1 --max_excluded 1 --logging_steps 1"
    words = f"sh train.sh --model_name_or_path {demo.model} --output_dir {tmp_path}/sft {folders} {flags}"
    run(words, NUM_PROCESSES=ranks, code=0)
    (logged,) = [log["loss"] for log in read_json(tmp_path / "sft/checkpoint-1/trainer_state.json")["log_history"][:1]]
    config = settings_for(Config(), str(demo.model))
    scorer, model = Scorer(load_processor(str(demo.model)), config), load_model(str(demo.model), "float32")
    files = [
        str(file) for folder in ("cat", "dog", "ragno") for file in sorted((unlike / "train_data" / folder).iterdir())
    ]
    truth = [scorer.labels.index(label) for label in labels]
    log_p = score_pictures(model, scorer, files, 6, [0] * 18)[range(18), truth].tolist()
    tokens = sum(len(scorer.answers[t]) for t in truth)
    weighted = sum(weights[label] * -value for label, value in zip(labels, log_p, strict=True)) / tokens
    assert logged == pytest.approx(weighted, rel=1e-4) and abs(weighted + sum(log_p) / tokens) > 1e-3
    changed = run(words.replace("--class_weights balanced", "--max_steps 2"), NUM_PROCESSES=ranks, code=2)
    assert "class_weights was 'balanced', is None (the loss would be another one)" in changed.output


def test_what_cannot_be_weighted_is_one_line(demo, run, tmp_path):
    words = f"sh train.sh --model_name_or_path {demo.model} --input_dir {demo.input} --temp_dir {demo.cache} "
    for flags, said in (
        ("--class_weights even", "class_weights: found even; expected balanced, or no such flag"),
        ("--class_weights balanced --loss_type dft", "--class_weights: found --loss_type dft"),
    ):
        done = run(f"{words} --output_dir {tmp_path}/sft --logging_dir {tmp_path} --dry_run {flags}", code=2)
        assert done.output.count("error: ") == 1 and said in done.output
