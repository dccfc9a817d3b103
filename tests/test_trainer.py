"""AnimalTrainer and what it changes: the mask, evaluation before step 1, fillers, signals, where a run starts."""

import json
import os
import pickle
import re
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import TrainerControl, TrainerState

from animals.checkpoint.load import load_model, load_processor, load_weights
from animals.checkpoint.steps import find_start, write_manifest
from animals.command import UserError
from animals.files import read_json
from animals.scoring.scorer import Scorer, score_batches, score_in_parts
from animals.training.batches import PictureCollator, add_fillers, fillers
from animals.training.lora import LORA_TARGETS
from animals.training.signals import StopOnSignal
from animals.training.trainer import without_mask
from config import Config


def row(path, size, label="cat"):
    Image.effect_mandelbrot(size, (-2, -1, 1, 1), 20).convert("RGB").save(path)
    question = [{"type": "image"}, {"type": "text", "text": Config().question}]
    answer = [{"type": "text", "text": label}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"images": [str(path)], "messages": messages, "label": label}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Pictures with three different numbers of tokens; the shortest is the first."""
    folder = tmp_path_factory.mktemp("rows")
    return [row(folder / f"{i}.png", size) for i, size in enumerate([(96, 96), (192, 192), (300, 90)])]


@pytest.fixture(scope="module")
def collator(demo):
    return PictureCollator(load_processor(str(demo.model)), assistant_only_loss=True)


@pytest.fixture
def scoring(demo, collator):
    return Scorer(collator.processor, Config()), load_model(str(demo.checkpoint), "float32")


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_loss_and_gradients_need_no_mask(demo, rows, collator, monkeypatch, lora):
    """The same loss and gradients in float32; SDPA gets is_causal and grouped heads instead of a mask."""
    batch = dict(collator(rows))
    batch.pop("pictures")
    assert batch["attention_mask"].sum(1).unique().numel() == 3, "padded"
    model = base = load_weights(str(demo.checkpoint), dtype=torch.float32, attn_implementation="sdpa")
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(base, LoraConfig(target_modules=LORA_TARGETS, init_lora_weights=False))
    model.train()
    calls, sdpa = [], torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, value, attn_mask=None, is_causal=False, enable_gqa=False, **kwargs):
        if query.shape[1] != key.shape[1] or attn_mask is not None or is_causal:  # the language model's
            calls.append((attn_mask is None, is_causal, enable_gqa, query.shape[1] // key.shape[1]))
        return sdpa(query, key, value, attn_mask=attn_mask, is_causal=is_causal, enable_gqa=enable_gqa, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)

    def step():
        model.zero_grad()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    loss, gradients = step()
    assert set(calls) == {(False, False, False, 1)}, "with its mask: keys and values are repeated"
    calls.clear()
    base.model.language_model.register_forward_pre_hook(without_mask, with_kwargs=True)
    loss_without, gradients_without = step()
    assert set(calls) == {(True, True, True, 2)}
    assert loss_without == pytest.approx(loss, abs=1e-5)
    assert gradients.keys() == gradients_without.keys()
    assert max((gradients[name] - gradients_without[name]).abs().max() for name in gradients) < 1e-5


def test_scoring_keeps_its_mask(scoring, rows):
    """In evaluation the hook changes nothing: the scorer's 4-D mask and positions reach the model."""
    scorer, model = scoring
    batch = scorer.collate([Image.open(r["images"][0]) for r in rows])
    before = scorer.score(model, batch)
    model.model.language_model.register_forward_pre_hook(without_mask, with_kwargs=True)
    assert torch.equal(scorer.score(model, batch), before)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("n", [6405, 64, 65, 127, 3])
def test_fillers_leave_nothing_to_repeat(n, balanced):
    for micro, accumulation, ranks in ((4, 4, 4), (1, 16, 4), (2, 2, 3)):
        more = len(fillers([5] * n, micro, accumulation, ranks, balanced))
        rest = (n + more) % (micro * accumulation * ranks)
        assert rest == 0 or rest >= accumulation * ranks if balanced else (n + more) % (micro * ranks) == 0
        assert more < (accumulation * ranks if balanced else micro * ranks)


def test_a_filler_teaches_nothing_and_survives_a_worker(demo, rows, collator):
    data = Dataset.from_list([{**r, "image_tokens": tokens} for r, tokens in zip(rows, (136, 250, 200), strict=True)])
    args = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "world_size": 2}
    args |= {"train_sampling_strategy": "random", "length_column_name": "image_tokens", "dataloader_drop_last": False}
    filled = add_fillers(data, SimpleNamespace(**args))
    assert filled["label"][:] == ["cat", "cat", "cat", None] and filled[3]["images"] == rows[0]["images"]
    worker = {"num_workers": 1, "multiprocessing_context": "spawn"}
    loader = torch.utils.data.DataLoader(filled, 4, collate_fn=pickle.loads(pickle.dumps(collator)), **worker)
    labels = next(iter(loader))["labels"]
    assert (labels != -100).sum(1).tolist() == [2, 2, 2, 0]


def test_a_batch_without_a_readable_picture_still_runs_a_forward(scoring, rows, tmp_path):
    scorer, model = scoring
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    forwards, pictures = [], [str(tmp_path / "bad.jpg"), rows[0]["images"][0]]
    model.register_forward_hook(lambda *_: forwards.append(1))
    done = list(score_batches(model, scorer, pictures, [[0], [1]], same_passes=True))
    assert len(forwards) == 2 and set(done[0][2]) == {0}
    assert done[0][1].isnan().all() and done[1][1].isfinite().all()


def test_out_of_memory_in_step_is_one_line_and_no_halves(scoring, rows):
    scorer, model = scoring
    batch = scorer.collate([Image.open(r["images"][0]) for r in rows])

    def full(module, args, kwargs):
        if len(kwargs["input_ids"]) > 1:
            raise torch.OutOfMemoryError

    model.register_forward_pre_hook(full, with_kwargs=True)
    with pytest.raises(UserError, match="out of memory in evaluation with 3 pictures .* lower --per_device_eval"):
        score_in_parts(scorer, model, batch, most=3, halve=False)
    log_p, most = score_in_parts(scorer, model, batch, most=3)
    assert log_p.isfinite().all() and len(log_p) == 3 and most == 1


def test_a_signal_saves_one_checkpoint_of_its_step(monkeypatch):
    """--save_strategy epoch would save the same step again, and delete the complete checkpoint for it first."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    stop, state = StopOnSignal(), TrainerState(global_step=3, max_steps=9)
    args, control = SimpleNamespace(device="cpu"), TrainerControl()
    stop.on_step_end(args, state, control)
    assert not control.should_save and not control.should_training_stop
    stop.on_signal(signal.SIGTERM, None)
    stop.on_step_end(args, state, control)
    assert control.should_save and control.should_training_stop and stop.agreed == signal.SIGTERM
    control.should_evaluate = True
    stop.on_epoch_end(args, state, control)
    assert not control.should_save and not control.should_evaluate
    state.global_step, control.should_save = 9, True  # the last step, which was not saved at its end
    stop.on_epoch_end(args, state, control)
    assert control.should_save


def test_one_ctrl_c_that_arrives_twice_does_not_end_the_run(monkeypatch):
    """From the terminal and from the launcher. A second Ctrl-C, more than a second after the first, does."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr("os._exit", sys.exit)
    stop = StopOnSignal()
    for _ in range(3):
        stop.on_signal(signal.SIGINT, None)
    stop.interrupted -= 1.1
    stop.on_signal(signal.SIGTERM, None)
    with pytest.raises(SystemExit, match="130"):
        stop.on_signal(signal.SIGINT, None)


@pytest.fixture
def started(demo, tmp_path):
    """(output_dir with checkpoints of ZeRO-3 at steps 400 and 471, settings of the run that wrote them)."""
    for name in ("checkpoint-400", "checkpoint-471"):
        shutil.copytree(demo.checkpoint / name, tmp_path / name, copy_function=os.link)
    return tmp_path, read_json(tmp_path / "checkpoint-471" / "run.json")


def without_states(checkpoint):
    """As --save_only_model would have written the checkpoint."""
    for name in ("latest", "complete.json"):
        Path(checkpoint, name).unlink()
    write_manifest(checkpoint)


def start_from(started, chosen=None, last_step=500, **changed):
    args = SimpleNamespace(output_dir=str(started[0]), resume_from_checkpoint=chosen, deepspeed_plugin=True)
    return find_start(args, {**started[1], **changed}, last_step)


def test_which_checkpoint_a_run_starts_from(started, capsys):
    older, newest = f"{started[0]}/checkpoint-400", f"{started[0]}/checkpoint-471"
    assert start_from(started) == start_from(started, "True") == start_from(started, "none") == newest
    assert start_from(started, older) == older
    without_states(newest)
    assert start_from(started) == older and f"{newest}: without the optimizer's states" in capsys.readouterr().err
    assert start_from(started, last_step=471) == newest, "only to be published"
    without_states(older)
    with pytest.raises(UserError, match=f"{newest}: found a model without the optimizer's states"):
        start_from(started)
    for folder in (older, newest):
        shutil.rmtree(folder)
    assert start_from(started) is None
    with pytest.raises(UserError, match="True: found no complete checkpoint-N"):
        start_from(started, "True")


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ("gone", "gone: found it incomplete .complete.json missing"),
        ("{}", "found it incomplete .complete.json missing"),  # the run's own folder
        ("{}/checkpoint-400", "checkpoint-400: found it without the optimizer's states"),
        ("False", "found False; expected a checkpoint-N or True"),
        ("true", "world_size was 1, is 2"),
        ("{}/checkpoint-471", "world_size was 1, is 2"),
    ],
)
def test_a_checkpoint_that_cannot_be_resumed_is_one_line(started, chosen, message):
    without_states(started[0] / "checkpoint-400")
    with pytest.raises(UserError, match=message) as error:
        start_from(started, chosen.format(started[0]), world_size=2)
    assert "\n" not in str(error.value)


FLAGS = "--eval_steps 1 --save_steps 1 --logging_steps 1 --max_steps 2 --per_device_train_batch_size 2 "
FLAGS += "--gradient_accumulation_steps 2 --eval_pictures 20"
LORA = [pytest.param(f"{ddp}--use_peft", marks=pytest.mark.slow) for ddp in ("--config_file scripts/ddp.yaml ", "")]


@pytest.mark.parametrize("recipe", ["", *LORA])
def test_evaluation_before_step_1_then_training(demo, run, tmp_path, recipe):
    """DDP and ZeRO-3 on two ranks; the first measurement is of the untuned model."""
    command = f"sh train.sh --model_name_or_path {demo.checkpoint} --input_dir {demo.input} --temp_dir {demo.cache} "
    command += f"--logging_dir {tmp_path}/logs --output_dir {tmp_path}/sft {FLAGS} {recipe}"
    run(command, NUM_PROCESSES=2, code=0)
    state = json.loads((tmp_path / "sft" / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    evaluations = [log for log in state if "eval_accuracy" in log]
    assert [log["step"] for log in evaluations] == [0, 1, 2] and evaluations[0]["eval_accuracy"] > 0.7
    assert not any("entropy" in key for log in evaluations for key in log), "TRL's figures of the training"
    if not recipe:  # peft leaves a card of its own
        card = (tmp_path / "sft" / "README.md").read_text()
        assert re.search(r"accuracy: 0\.\d{4} on 20 .* at step 2; untuned: 0\.\d{4}", card)
    shutil.rmtree(tmp_path / "sft" / "checkpoint-2")
    done = run(command, NUM_PROCESSES=2, code=0)
    assert "resuming from" in done.output
    assert done.output.count("eval_accuracy") == 1, "not again on a resume"
    if not recipe:
        done = run(f"{command} --seed 7 --data_seed 3", NUM_PROCESSES=2, code=2)
        assert "seed was 42, is 7 (the order" in done.output and "data_seed was" in done.output
