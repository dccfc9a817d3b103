"""Batch size, order and rank count change nothing; what does not fit into memory goes in parts; validation.py."""

import contextlib
import copy
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset

from animals.checkpoint.image_tokens import image_token_count, read_geometry
from animals.checkpoint.load import load_model, load_processor
from animals.checkpoint.steps import global_step, newest_complete, run_name, write_manifest
from animals.command import UserError
from animals.pictures.read import list_pictures, load_picture
from animals.scoring.report import read_report
from animals.scoring.scorer import Scorer, load_scorer, score_pictures, stratified_sample
from config import Config

PER_CLASS = 4  # held-out pictures of the demo: enough to compare, quick to score


@pytest.fixture(scope="module")
def few(demo, tmp_path_factory):
    """A small input folder with held-out pictures of the demo and odd shapes, so that a batch is padded."""
    root = tmp_path_factory.mktemp("few")
    for folder in sorted((demo.input / "validation_data").iterdir()):
        (root / "validation_data" / folder.name).mkdir(parents=True)
        for i, path in enumerate(sorted(folder.iterdir())[:PER_CLASS]):
            picture = load_picture(str(path))
            if i == 1:
                picture = picture.resize([(300, 60), (60, 300), (250, 240), (97, 61)][len(folder.name) % 4])
            picture.save(root / "validation_data" / folder.name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def scored(demo, few):
    """(scorer, model, paths, image tokens, log-probabilities scored one picture at a time), float32."""
    scorer = Scorer(load_processor(str(demo.checkpoint)), Config())
    model = load_model(str(demo.checkpoint), "float32")
    paths = list_pictures(str(few / "validation_data"))
    geometry = read_geometry(str(demo.checkpoint))
    lengths = [image_token_count(*load_picture(path).size, geometry) for path in paths]
    assert len(set(lengths)) > 4
    return scorer, model, paths, lengths, score_pictures(model, scorer, paths, 1, lengths)


@pytest.mark.parametrize("batch_size", [3, 8])
@pytest.mark.parametrize("order", ["by length", "shuffled"])
def test_batch_size_and_order_change_nothing(scored, batch_size, order):
    scorer, model, paths, lengths, alone = scored
    shuffle = np.random.default_rng(batch_size).permutation(len(paths)).tolist()
    # When they are shuffled, a batch has pictures of unlike lengths: much padding, which must not leak.
    sizes = [lengths[i] for i in shuffle] if order == "by length" else [0] * len(paths)
    together = score_pictures(model, scorer, [paths[i] for i in shuffle], batch_size, sizes)
    p, q = alone[shuffle].softmax(1), together.softmax(1)
    assert (p - q).abs().max() < 1e-4 and torch.equal(p.argmax(1), q.argmax(1))
    assert (q.double().sum(1) - 1).abs().max() < 1e-6
    assert alone.std(0).max() > 0.01, "pictures differ in what they score"


class SmallMemory(torch.nn.Module):
    """The model on a GPU that holds `fits` pictures at once."""

    def __init__(self, model, fits):
        super().__init__()
        self.model, self.fits, self.device, self.dtype, self.sizes = model, fits, model.device, model.dtype, []
        self.get_output_embeddings = model.get_output_embeddings

    def forward(self, **inputs):
        self.sizes.append(len(inputs["input_ids"]))
        if self.sizes[-1] > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.model(**inputs)


def test_a_batch_that_does_not_fit_goes_in_parts(scored, capsys):
    scorer, model, paths, lengths, alone = scored
    small = SmallMemory(model, 3)
    together = score_pictures(small, scorer, paths[:20], 10, lengths[:20])
    assert (alone[:20].softmax(1) - together.softmax(1)).abs().max() < 1e-4
    assert small.sizes[:3] == [10, 5, 3] and sum(size for size in small.sizes if size <= 3) == 20
    assert small.sizes.count(10) == 1 and small.sizes.count(5) == 1, "what is known not to fit is not tried again"
    said = capsys.readouterr().err
    assert "out of memory with 10 pictures at once: going on with 5" in said
    assert "out of memory with 5 pictures at once: going on with 3" in said
    with pytest.raises(UserError, match=r"^out of memory in evaluation with 1 picture of \d+ tokens; [^\n]*$"):
        score_pictures(SmallMemory(model, 0), scorer, paths[:2], 2, lengths[:2])


def test_a_picture_that_was_not_scored_is_no_number(scored):
    scorer, model, paths, lengths, _ = scored
    with pytest.raises(AssertionError, match="a picture was not scored"):
        score_pictures(model, scorer, paths, -8, lengths)


@pytest.mark.parametrize("size", ["-8", "0", "nan", "4097"])
@pytest.mark.parametrize("command", ["python validation.py", "sh validation.sh"])
def test_a_batch_size_that_is_none_is_one_line(run, command, size):
    done = run(f"{command} --per_device_eval_batch_size {size}", code=2)
    [error] = done.output.splitlines()
    assert "per_device_eval_batch_size: " in error
    assert size == "nan" or error.endswith(f": found {size}; expected a number from 1 to 4096")  # nan: argparse says it


@pytest.mark.parametrize("part", ["lm_head", "vision_tower", "multi_modal_projector"])
def test_weights_that_are_not_finite_are_one_line(demo, few, run, tmp_path, part):
    """In test.py and in validation; the page of scripts/serve.py asks Scorer.score() as they do."""
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(demo.checkpoint, tmp_path / "broken", ignore=shutil.ignore_patterns("checkpoint-*"))
    weights = load_file(broken / "model.safetensors")
    name = next(name for name in weights if part in name and name.endswith("weight"))
    weights[name][0] = float("nan" if part == "lm_head" else "inf")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    flags = f"--input_dir {few} --model_name_or_path {broken}"
    said = f"error: {broken}: found log-probabilities that are not finite numbers; expected finite ones; the weights "
    validation = f"validation.py --report_dir {tmp_path}/r --temp_dir {tmp_path}/temp"
    for command in (f"test.py {few} --output {tmp_path}/names.csv", validation):
        done = run(f"python {command} {flags}", code=2)
        [error] = [line for line in done.output.splitlines() if "rror" in line]
        assert error.startswith(said) and "Traceback" not in done.output
    assert "nan" not in (tmp_path / "names.csv").read_text() and not (tmp_path / "r").exists()


def test_what_training_says_of_its_evaluation(scored, capsys):
    """One answer only; weights of NaN in the middle of a run; before its first step they are those of the folder."""
    from animals.training.trainer import AnimalTrainer

    scorer, model, paths, lengths, alone = scored
    said = scorer.labels[alone[0].argmax()]
    other = next(label for label in scorer.labels if label != said)
    data = {"images": [[paths[0]]] * 10, "label": [other] * 10, "image_tokens": lengths[:1] * 10}
    trainer = SimpleNamespace(
        eval_dataset=Dataset.from_dict(data), scorer=scorer, model=copy.deepcopy(model),
        is_deepspeed_enabled=False, autocast_smart_context_manager=contextlib.nullcontext, log=dict, control=None,
        args=SimpleNamespace(per_device_eval_batch_size=5), state=SimpleNamespace(global_step=7),
        callback_handler=SimpleNamespace(on_evaluate=lambda *_: None),
    )  # fmt: skip
    assert AnimalTrainer.evaluate(trainer)["eval_accuracy"] == 0
    text = capsys.readouterr().err
    assert f"step 7: warning: more than 90 % of the answers are {said}, the label of fewer than half" in text
    assert f"step 7: warning: never answered, though each has ten pictures or more: {other}\n" in text
    trainer.model.get_output_embeddings().weight.data[:] = float("nan")
    with pytest.raises(
        UserError, match="^step 7: evaluation found .*; the run has diverged; .* lower --learning_rate$"
    ):
        AnimalTrainer.evaluate(trainer)
    trainer.state.global_step = 0
    with pytest.raises(UserError, match="the weights are damaged"):
        AnimalTrainer.evaluate(trainer)


def test_float16_may_be_too_small(scored):
    scorer, model, paths, _, _ = scored
    small = SmallMemory(model, 1)
    infinite = SimpleNamespace(logits=torch.full((1, len(scorer.fed_ids) + 1, 40_000), float("inf")))
    small.dtype, small.config, small.forward = torch.float16, model.config, lambda **inputs: infinite
    with pytest.raises(UserError, match=r"or float16 is too small for them: --dtype bfloat16$"):
        scorer.score(small, scorer.collate([load_picture(paths[0])]))


@pytest.mark.parametrize("flag", ["report_dir", "logging_dir"])
def test_places_that_cannot_be_written_are_tried_first(demo, run, tmp_path, flag):
    (tmp_path / "file").write_text("")
    places = f"--report_dir {tmp_path}/r --logging_dir {tmp_path}/l --{flag} {tmp_path}/file"
    done = run(f"python validation.py --model_name_or_path {tmp_path}/nowhere {places}", code=2)
    assert done.output.startswith(f"error: --{flag} {tmp_path}/file")
    assert len(done.output.splitlines()) == 1 and "where no file can be written" in done.output


def test_held_out_pictures_in_quarantine_are_said(by_one, demo, few, run, tmp_path):
    """Three wrong or doubtful ones are taken away: the report gives the accuracy with them, as it was before."""
    flags, alone = by_one
    shutil.copytree(few, tmp_path / "input")
    flags += f" --input_dir {tmp_path}/input --temp_dir {tmp_path}/temp --report_dir {tmp_path}/r"
    _, rows = read_report(alone["report"])
    rows.sort(key=lambda row: (row["correct"], row["probability"]))
    listed = [str(tmp_path / "input" / os.path.relpath(row["image"], few)) for row in rows[:3]]
    (tmp_path / "list.csv").write_text("\n".join(["image", *listed]))
    places = f"{tmp_path}/list.csv --input_dir {tmp_path}/input --temp_dir {tmp_path}/temp"
    run(f"python scripts/quarantine.py {places} --held_out_too --force", code=0)
    done = run(f"python validation.py {flags} --language en", code=0)
    last = json.loads(done.output.splitlines()[-1])
    report, _ = read_report(last["report"])
    before, found = read_report(alone["report"])[0], report["quarantined"]
    assert (last["n"], found["n"], found["n_with"]) == (before["n"] - 3, 3, before["n"])
    assert found["accuracy_with"] == before["accuracy"] and last["accuracy"] >= before["accuracy"]
    assert found["accuracy_with_ci95"] == pytest.approx(before["accuracy_ci95"])
    said = "quarantine: 3 held-out pictures are there; with those that can be read the accuracy is"
    assert f"{said} {before['accuracy']:.4f}" in done.output
    (tmp_path / "input" / "quarantine" / os.path.relpath(listed[0], tmp_path / "input").replace("_data", "")).unlink()
    done = run(f"python validation.py {flags} --on_eval_pictures --eval_pictures 20", code=0)
    report, _ = read_report(last["report"])
    assert (report["quarantined"]["n"], report["quarantined"]["n_with"], report["n"]) == (3, 20, 20)
    assert "quarantine: 3 held-out pictures are there\n" in done.output
    run(f"python validation.py {flags}", code=0)
    assert read_report(last["report"])[0]["quarantined"]["n_with"] == before["n"] - 1


@pytest.fixture(scope="module")
def by_one(run, demo, few, tmp_path_factory):
    """(flags, last line of stdout) of one rank."""
    root = tmp_path_factory.mktemp("one")
    flags = f"--input_dir {few} --temp_dir {root}/temp --report_dir {root}/reports --logging_dir {root}/logs"
    flags += f" --dtype float32 --model_name_or_path {demo.checkpoint}"
    done = run(f"sh validation.sh {flags}", NUM_PROCESSES=1, code=0)
    return flags, json.loads(done.output.splitlines()[-1])


@pytest.mark.parametrize("ranks", [2, 3])
def test_more_ranks_change_nothing(by_one, run, tmp_path, ranks):
    """Ranks with unequal shares, batches of 3 pictures, compared with the report of the single rank."""
    flags, alone = by_one
    flags += f" --report_dir {tmp_path}/reports --logging_dir {tmp_path}/logs --per_device_eval_batch_size 3"
    done = run(f"sh validation.sh {flags} --compare_with {alone['report']}", NUM_PROCESSES=ranks, code=0)
    last = json.loads(done.output.splitlines()[-1])
    assert (last["accuracy"], last["n"]) == (alone["accuracy"], alone["n"])
    (report, many), (_, one) = (read_report(brief["report"]) for brief in (last, alone))
    assert len(one) == 10 * PER_CLASS
    for row, before in zip(many, one, strict=True):
        assert (row["image"], row["prediction"]) == (before["image"], before["prediction"])
        p, q = (np.array([side[label] for label in report["labels"]]) for side in (row, before))
        assert np.abs(p - q).max() < 1e-4 and q.sum() == pytest.approx(1, abs=1e-9)
    same = report["comparison"]
    assert (same["difference"], same["verdict"], same["changed"], same["only_this"]) == (0, "not_established", [], 0)
    assert report["processes"] == ranks and "baselines" not in report
    assert len(list((tmp_path / "logs" / Path(last["report"]).parent.name / "validation").iterdir())) == 1


def test_other_pictures_end_with_one_line(by_one, run, demo):
    flags, brief = by_one
    done = run(f"python validation.py {flags} --input_dir {demo.input} --compare_with {brief['report']}", code=2)
    [error] = [line for line in done.output.splitlines() if "error" in line.lower()]
    assert error.startswith(f"error: --compare_with {brief['report']}: found other pictures (40 not held out here")


def test_a_checkpoint_that_cannot_be_read_is_one_line(demo, tmp_path):
    broken = shutil.copytree(demo.checkpoint, tmp_path / "broken", ignore=shutil.ignore_patterns("checkpoint-*"))
    os.truncate(broken / "model.safetensors", 100_000)
    with pytest.raises(UserError, match=r"^[^\n]*model.safetensors: found 100,000 bytes[^\n]*$"):
        load_scorer(str(broken), Config(), "float32")
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(
        UserError, match=rf"^{broken}: cannot be read: found \w+ \([^\n]*\); expected the files [^\n]*$"
    ):
        load_scorer(str(broken), Config(), "float32")


def test_the_sample_has_the_classes_in_proportion():
    labels = ["few"] * 2 + ["many"] * 10
    assert stratified_sample(labels, 0) == list(range(12))
    assert stratified_sample(labels, 6) == stratified_sample(labels, 6)
    for n, of_few in ((1, 0), (6, 1), (12, 2)):
        chosen = stratified_sample(labels, n)
        assert len(set(chosen)) == n and sum(i < 2 for i in chosen) == of_few and chosen == sorted(chosen)


def test_the_newest_complete_checkpoint_is_found(tmp_path):
    for name in ("checkpoint-2", "checkpoint-10", "checkpoint-best", "30"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_bytes(b"complete")
        write_manifest(str(tmp_path / name))
    assert newest_complete(str(tmp_path)) == (str(tmp_path / "checkpoint-10"), [])
    (tmp_path / "checkpoint-10" / "weights").write_bytes(b"cut")
    newest, (line,) = newest_complete(str(tmp_path))
    assert newest == str(tmp_path / "checkpoint-2")
    assert "checkpoint-10: incomplete (weights missing or cut short)" in line
    assert newest_complete(str(tmp_path / "nowhere")) == (None, [])


def test_names_and_steps(tmp_path, monkeypatch):
    for name in ("checkpoint-9", "checkpoint-100", "checkpoint-x"):
        (tmp_path / "sft" / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "sft")
    assert (run_name("."), run_name("checkpoint-9/"), run_name("../sft/")) == ("sft", "sft", "sft")
    assert (global_step("checkpoint-9"), global_step("."), global_step("checkpoint-x")) == (9, 100, None)
    (tmp_path / "sft" / "trainer_state.json").write_text('{"global_step": 123}')
    assert global_step(".") == 123
