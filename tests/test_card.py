"""The model card: what validation.py measured is in it as Hugging Face reads it, and what is uploaded with it."""

import re
import shutil
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects

from animals.checkpoint.card import add_result, read_card, write_card
from animals.checkpoint.steps import missing_files, write_manifest
from animals.command import UserError
from animals.files import read_json
from animals.pictures.prepare import check_inputs
from animals.scoring.report import read_report
from config import Config
from tests.conftest import ROOT
from tests.helpers.pictures import drawn, held, train

REPORT = {"accuracy": 0.75, "accuracy_ci95": [0.3, 0.95], "n": 4, "duplicates": {"identical": 1, "near_duplicates": 0}}


def numbers(folder):
    """{metric: value} of the only data set in the card's metadata, and its first EvalResult."""
    results = ModelCard.load(folder / "README.md").data.eval_results
    assert len({(result.unique_identifier, result.dataset_name) for result in results}) == 1
    assert len({result.metric_type for result in results}) == len(results)
    return {result.metric_type: result.metric_value for result in results}, results[0]


def test_validation_writes_what_it_measured_when_asked(demo, run, tree, tmp_path):
    picture = drawn(4000)  # the first one of train/cat
    picture.save(held(tree, "cat", "near.jpg"), quality=60)
    shutil.copy(train(tree, "cat", "0.jpg"), held(tree, "cat", "identical.jpg"))
    tree.allow_leaks = True
    check_inputs(tree, str(demo.checkpoint), ("train", "validation"))  # with both, the next commands know of duplicates
    folder = shutil.copytree(demo.checkpoint, tmp_path / "model", ignore=shutil.ignore_patterns("checkpoint-*"))
    command = f"python validation.py --model_name_or_path {folder} --input_dir {tree.input_dir} --allow_leaks "
    command += (
        f"--temp_dir {tree.temp_dir} --max_excluded 1 --report_dir {tmp_path}/reports --logging_dir {tmp_path}/logs"
    )
    card, reports = folder / "README.md", []
    before = card.read_text(encoding="utf-8")
    for flag in ("", "--write_model_card"):
        assert card.read_text(encoding="utf-8") == before
        run(f"{command} {flag}", code=0)
        reports.append(read_report(str(tmp_path / "reports" / "model"))[0])
    without, report = reports
    assert report["checkpoint"] == without["checkpoint"], "a report is found by it: the card does not change the model"
    found, first = numbers(folder)
    assert (first.task_type, first.dataset_type, first.dataset_name) == ("image-classification", "imagefolder", "input")
    low, high = report["accuracy_ci95"]
    assert found == {
        "accuracy": report["accuracy"], "accuracy_ci95_low": low, "accuracy_ci95_high": high, "n": 8,
        "identical_in_train": 1, "near_duplicates_in_train": 1,
    }  # fmt: skip
    after = card.read_text(encoding="utf-8")
    assert after.split("\n---\n", 1)[1] == before.split("\n---\n", 1)[1]
    assert ModelCard(after).data.pipeline_tag == "image-text-to-text"
    add_result(folder, report, tree.input_dir)
    assert card.read_text(encoding="utf-8") == after, "one result, not two"


@pytest.mark.parametrize("name", ['it\'s "q" {{7*7}}', "a\n---\n# [x](y) `b`", ": - &a *b !!c", "---", "<b>"])
def test_names_are_data_and_the_results_of_others_stay(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "task.json").write_text("{}")
    add_result(folder, REPORT, folder)
    found, first = numbers(folder)
    assert found == {"accuracy": 0.75, "accuracy_ci95_low": 0.3, "accuracy_ci95_high": 0.95, "n": 4,
                     "identical_in_train": 1, "near_duplicates_in_train": 0}  # fmt: skip
    card = ModelCard.load(folder / "README.md")
    assert (first.dataset_name, card.data.model_name) == (name, name)
    assert card.text.startswith("\n# `") and len(card.text.splitlines()) == 2
    for result in card.data.eval_results:
        result.dataset_split = "test"
    card.save(folder / "README.md")
    add_result(folder, REPORT | {"duplicates": {"identical": None, "near_duplicates": None}}, "elsewhere/")
    results = ModelCard.load(folder / "README.md").data.eval_results
    assert [(result.dataset_split, result.dataset_name) for result in results[5:7]] == [
        ("test", name), ("validation", "elsewhere"),
    ]  # fmt: skip
    assert len(results) == 6 + 4, "what nobody searched is not there"


def test_a_card_that_cannot_be_changed_is_one_line_before_the_work(demo, run, tmp_path):
    done = run(f"python validation.py --write_model_card --model_name_or_path {demo.model}", code=2)
    assert done.output.startswith(f"error: --write_model_card: found no task.json in {demo.model}; expected a model")
    assert len(done.output.splitlines()) == 1
    (tmp_path / "task.json").write_text("{}")
    for text in (
        "---\na: [\n---\n",
        "---\n1: 2\n---\n",
        "---\n- a\n---\n",
        "---\nmodel-index:\n- name: x\n---\n",
        None,
    ):
        (tmp_path / "README.md").write_text(text) if text else (tmp_path / "README.md").unlink()
        (tmp_path / "README.md").mkdir() if not text else None
        with pytest.raises(
            UserError, match=r"^--write_model_card: found [^\n]+ in [^\n]+; expected a model card[^\n]+$"
        ):
            read_card(tmp_path)


def test_a_new_card_leaves_a_checkpoint_complete(tmp_path):
    """peft writes a card into checkpoint-N, from which a run can still go on after validation.py has added to it."""
    for name in ("task.json", "README.md"):
        (tmp_path / name).write_text("{}")
    write_manifest(tmp_path)
    add_result(tmp_path, REPORT, "input")
    assert missing_files(tmp_path) == []
    (tmp_path / "task.json").write_text("")
    assert missing_files(tmp_path) == ["task.json"]


def test_the_documented_upload_has_the_model_and_nothing_else(demo):
    [command] = re.findall(r"^hf upload .*$", (ROOT / "scripts/README.md").read_text(encoding="utf-8"), re.M)
    exclude = [word.strip('"') for word in re.findall(r"--exclude (\S+)", command)]
    files = [str(path.relative_to(demo.checkpoint)) for path in demo.checkpoint.rglob("*") if path.is_file()]
    sent, base = set(filter_repo_objects(files, ignore_patterns=exclude)), {path.name for path in demo.model.iterdir()}
    weights = {name for name in sent | base if name.startswith("model")}
    assert sent & weights and sent - weights == base - weights | {"task.json", "README.md"}


def test_the_card_names_no_folder_but_the_models_own(demo, tmp_path):
    record, config = read_json(demo.checkpoint / "run.json"), Config()
    scorer = SimpleNamespace(config=config, labels=config.labels, answers=[[1]])
    write_card(tmp_path, scorer, SimpleNamespace(log_history=[], global_step=2, max_steps=2), record)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert all(f"{name} {version}" in card for name, version in record["versions"].items())
    assert "/" not in card.replace(str(tmp_path), "")
