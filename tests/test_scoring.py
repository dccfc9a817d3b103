"""Batch size, order and rank count change nothing; what does not fit into memory goes in parts; validation.py."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

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
    with pytest.raises(torch.OutOfMemoryError):
        score_pictures(SmallMemory(model, 0), scorer, paths[:2], 2, lengths[:2])


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
    with pytest.raises(UserError, match=rf"^{broken}: found \w+ \([^\n]*\); expected a complete checkpoint; [^\n]*$"):
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
