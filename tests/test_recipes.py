"""`sh train.sh --rehearse all`: which recipes are tried, which is the fastest, and what is left when it is killed."""

import json
import re
import shlex
import signal
import time
from unittest.mock import Mock

import pytest
import torch
import yaml
from torch.autograd.graph import save_on_cpu

from animals.checkpoint.load import load_model, load_processor
from animals.pictures.read import list_pictures
from animals.training.batches import PictureCollator
from animals.training.recipes import OFFLOAD, command, recipes
from config import Config
from tests.conftest import ROOT
from tests.test_rehearsal import command as training
from tests.test_survive import run_until

ZERO3 = "./scripts/deepspeed_zero3.yaml"


def test_all_recipes_take_the_same_pictures_per_step():
    found = recipes(4, 4, ZERO3, gpus=4)
    sizes = [tuple(map(int, re.findall(r"(?:batch_size|accumulation_steps) (\d+)", r["flags"]))) for r in found]
    assert sizes == [(4, 4)] * 4 + [(8, 2)] * 4 + [(16, 1)] * 4 and len({r["name"] for r in found}) == 12
    assert [sum(text in r["flags"] for r in found) for text in ("zero3_gpu.yaml", '{"offload": true}')] == [6, 6]
    assert len(recipes(4, 4, ZERO3, gpus=0)) == 3 and len(recipes(2, 3, "scripts/ddp.yaml", gpus=1)) == 2 * 2


def test_parameters_on_the_gpu_is_the_only_difference():
    plain, gpu = (yaml.safe_load((ROOT / "scripts" / f"deepspeed_zero3{end}.yaml").read_text()) for end in ("", "_gpu"))
    files = [part["deepspeed_config"].pop("deepspeed_config_file") for part in (plain, gpu)]
    assert plain == gpu and files == ["scripts/zero3.json", "scripts/zero3_gpu.json"]
    settings, moved = (json.loads((ROOT / file).read_text()) for file in files)
    assert settings["zero_optimization"].pop("offload_param") and settings == moved


def test_the_command_to_copy_has_what_the_user_gave():
    lines = re.findall(r'^set -- (.*) "\$@"', (ROOT / "train.sh").read_text(), re.M)
    defaults = [word for line in reversed(lines) for word in shlex.split(line)]
    given = ["--input_dir", "my pets", "--rehearse", "all"]
    assert command([*defaults, *given], "--flags") == "sh train.sh --input_dir 'my pets' --flags"


def test_activations_in_host_ram_change_no_gradient(demo, monkeypatch):
    """As --activation_checkpointing_kwargs '{"offload": true}', whose pinned memory needs a GPU: here without."""
    unpinned = Mock(side_effect=lambda pin_memory, device_type: save_on_cpu(device_type=device_type))
    monkeypatch.setattr("transformers.modeling_utils.save_on_cpu", unpinned)
    pictures = list_pictures(demo.input / "train_data")[:4]
    collate = PictureCollator(load_processor(demo.checkpoint), assistant_only_loss=True)
    batch = collate([{"images": [path], "messages": Config().conversation("cat"), "label": "cat"} for path in pictures])
    del batch["pictures"]
    found = []
    for offload in (False, True):
        model = load_model(demo.checkpoint, "float32").train()
        model.activation_checkpointing_enable(offload=offload)
        loss = model(**batch).loss
        loss.backward()
        found.append((loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (loss, plain), (same, offloaded) = found
    assert unpinned.called and torch.allclose(loss, same, rtol=1e-5) and len(plain) > 50
    assert all(torch.allclose(plain[name], offloaded[name], rtol=1e-5, atol=1e-7) for name in plain)


UNPINNED = """
import sys
sys.path.insert(0, {root!r})
import train
import transformers.modeling_utils as library

class Copied(library.save_on_cpu):
    def __init__(self, **kwargs):
        super().__init__()  # without pinned memory, which needs a GPU
        self.pack_hook = self.copy

    def copy(self, tensor):
        print("a copy waits")
        return tensor.device, tensor.clone()

library.save_on_cpu = Copied
train.main()
"""


@pytest.mark.slow
def test_no_offload_changes_a_loss_or_a_gradient(demo, run, tmp_path):
    """Two CPU ranks in float32. On them DeepSpeed's offloaded parameters are in the same RAM, in other buffers."""
    (tmp_path / "unpinned.py").write_text(UNPINNED.format(root=str(ROOT)))
    found = []
    for i, (file, offload) in enumerate((("zero3_gpu", ""), ("zero3", ""), ("zero3", OFFLOAD))):
        flags = training(demo, tmp_path / str(i), "--save_steps 3 --eval_strategy no --use_cpu", offload)
        flags += " --optim adamw_bnb_8bit --gradient_checkpointing --num_train_epochs 1"
        launch = f"accelerate launch --config_file scripts/deepspeed_{file}.yaml --num_processes 2"
        words = f"--main_process_port 0 {tmp_path}/unpinned.py {flags.partition('train.sh ')[2]}"
        done = run(f"{launch} {words}", code=0)
        assert ("a copy waits" in done.output) == bool(offload)
        state = json.loads((tmp_path / str(i) / "checkpoint-3" / "trainer_state.json").read_text())
        steps = [[log["loss"], log["grad_norm"]] for log in state["log_history"] if "loss" in log]
        found.append(torch.tensor(steps, dtype=torch.float64))
    assert found[0].shape == (3, 2) and len(found[0].unique()) == 6
    assert all(torch.allclose(found[0], other, rtol=1e-5, atol=0) for other in found[1:])


@pytest.mark.slow
def test_the_order_of_the_recipes_is_that_of_real_runs(demo, run, tmp_path):
    """Each recipe is run three times in full; the first is slower than the last by far, so their order is sure."""
    flags = "--save_strategy no --eval_strategy no --eval_on_start False --max_steps 6 --train_sampling_strategy random"
    done = run(training(demo, tmp_path / "sft", flags, "--rehearse all"), NUM_PROCESSES=2, code=0)
    measured = dict(re.findall(r"^(\d+ x \d+) +([\d.]+) ", done.output, re.M))
    order, seconds = sorted(measured, key=lambda name: float(measured[name])), {}
    assert list(measured) == ["4 x 2", "8 x 1"] and f"the fastest: {order[0]}" in done.output
    for name in measured:
        sizes = "--per_device_train_batch_size {} --gradient_accumulation_steps {}".format(*name.split(" x "))
        runs = [run(training(demo, tmp_path / f"{name[0]}-{i}", flags, sizes), NUM_PROCESSES=2) for i in range(3)]
        seconds[name] = min(float(re.search(r"'train_runtime': '?([\d.]+)", ran.output)[1]) for ran in runs)
    assert sorted(seconds, key=seconds.get) == order, (seconds, measured)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_killed_in_the_middle_nothing_is_left(demo, tmp_path, number):
    def end(process):
        time.sleep(8)
        process.send_signal(number)

    code, _ = run_until("recipe 1 of 2", training(demo, tmp_path / "sft", "--rehearse all"), end, NUM_PROCESSES=2)
    assert code in (128 + number, 2) and not list(tmp_path.glob("sft*"))
