"""LoRA on the narrow replica: what trains, what is saved, resume, merge, 4 bit, adapters in place of models."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import replica
import torch
from PIL import Image
from safetensors.torch import load_file

from animals.checkpoint.check import check_files
from animals.checkpoint.load import load_for_training, load_model, load_processor
from animals.checkpoint.task import read_task, task_of
from animals.command import UserError
from animals.scoring.scorer import Scorer
from config import Config
from scripts import merge_lora
from train import parse

STEPS = "--per_device_train_batch_size 1 --gradient_accumulation_steps 1 --logging_steps 1 --eval_strategy no "
STEPS += "--learning_rate 1e-2 --warmup_ratio 0 --use_peft"


@pytest.fixture(scope="module")
def trained(hub, data, run, tmp_path_factory):
    """Two steps of 2-rank ZeRO-3, a checkpoint after each."""
    out = tmp_path_factory.mktemp("lora") / "sft"
    command = f"sh train.sh {data} {STEPS} --model_name_or_path {hub} --output_dir {out} --max_steps 2 --save_steps 1"
    done = run(command, NUM_PROCESSES=2, code=0)
    return SimpleNamespace(out=out, command=command, output=done.output)


def test_only_adapters_train_and_only_they_are_saved(trained):
    total = sum(torch.Size(s).numel() for s in replica.hub_shapes(replica.hub_config(2, 3, full_width=False)).values())
    linear = [(64, 64), (32, 64), (32, 64), (64, 64), (96, 64), (96, 64), (64, 96)]  # q, k, v, o, gate, up, down
    own = 2 * sum(16 * (out + into) for out, into in linear)  # in each of the 2 layers; A is 16 x in, B is out x 16
    assert f"{own:,} of {total + own:,} parameters = " in trained.output
    values = load_file(trained.out / "adapter_model.safetensors")
    assert sum(value.numel() for value in values.values()) == own
    assert all("language_model.layers." in name and "lora_" in name for name in values)
    assert all(value.abs().max() > 0 for value in values.values()), "a tensor that stayed at 0 was not trained"
    assert not list(trained.out.rglob("model*.safetensors"))
    state = sum(os.path.getsize(p) for p in (trained.out / "checkpoint-2").rglob("*optim_states.pt"))
    assert state < 20 * own, "optimizer state of the adapters alone"
    assert check_files(trained.out) == []


def test_resumed_adapter_is_the_same_to_the_bit(trained, run):
    before = (trained.out / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(trained.out / "checkpoint-2")
    (trained.out / "adapter_model.safetensors").unlink()
    done = run(trained.command, NUM_PROCESSES=2, code=0)
    assert f"resuming from {trained.out}/checkpoint-1" in done.output
    assert (trained.out / "adapter_model.safetensors").read_bytes() == before


WATCH = """
import json, sys
import torch
import train
from animals.training import trainer
original = trainer.AnimalTrainer.train
def watched(self, *args, **kwargs):
    before = {name: value.detach().clone() for name, value in self.model.named_parameters()}
    result = original(self, *args, **kwargs)
    now = dict(self.model.named_parameters())
    optimized = {id(value) for group in self.optimizer.param_groups for value in group["params"]}
    changed = [name for name in now if not torch.equal(before[name], now[name])]
    types = sorted({str(value.dtype) for name, value in now.items() if "lora_" not in name})
    print(json.dumps([changed, len(now), [name for name in now if id(now[name]) in optimized], types]))
    return result
trainer.AnimalTrainer.train = watched
train.main()
"""


@pytest.mark.parametrize("flags", [[], ["--load_in_4bit", "--eval_on_start"]], ids=["16bit", "4bit"])
def test_base_stays_bit_identical(hub, data, tmp_path, flags):
    """The live model of train.py before and after three steps, in bf16 and in bitsandbytes' 4 bit.

    In 4 bit after an evaluation, in which bitsandbytes would repack the weights on a CPU.
    """
    command = [sys.executable, "-c", WATCH, *data.split(), *STEPS.split(), *flags, "--max_steps", "3"]
    command += ["--save_strategy", "no", "--model_name_or_path", str(hub), "--output_dir", str(tmp_path / "out")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "BF16_ON_CPU": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    changed, count, optimized, types = next(json.loads(x) for x in done.stdout.splitlines() if x.startswith('[["'))
    assert len(changed) == 28 and all("lora_" in name for name in changed) and count - len(changed) == 81
    assert sorted(optimized) == sorted(changed)
    assert types == ["torch.bfloat16", *["torch.uint8"] * bool(flags)]


def scores(folder):
    picture = Image.effect_mandelbrot((300, 225), (-2, -1, 1, 1), 50).convert("RGB")
    scorer = Scorer(load_processor(folder), Config())
    return scorer.score(load_model(folder, "float32"), scorer.collate([picture]))


def test_merged_and_unmerged_say_the_same(trained, hub, tmp_path):
    merge_lora.merge(str(trained.out), str(tmp_path / "merged"), "float32")
    tasks = [read_task(folder) for folder in (trained.out / "checkpoint-2", trained.out, tmp_path / "merged")]
    assert tasks == [task_of(Config())] * 3
    unmerged, merged, base = scores(str(trained.out)), scores(str(tmp_path / "merged")), scores(str(hub))
    assert (unmerged - base).abs().max() > 0.1, "the adapter does something"
    assert (unmerged - merged).abs().max() < 1e-3 and unmerged.argmax() == merged.argmax()
    saved = {name: tuple(value.shape) for name, value in load_file(tmp_path / "merged" / "model.safetensors").items()}
    assert saved == replica.hub_shapes(replica.hub_config(2, 3, full_width=False))
    others = {name for name in os.listdir(hub) if "model-" not in name} - {"model.safetensors.index.json"}
    assert others <= set(os.listdir(tmp_path / "merged"))


@pytest.mark.slow
def test_commands_take_the_adapter(trained, data, run, others_pictures, tmp_path, monkeypatch, capsys):
    flags = f"--model_name_or_path {trained.out}/checkpoint-1"
    done = run(f"sh validation.sh {data} {flags} --report_dir {tmp_path}/report", code=0)
    assert json.loads(done.output.strip().splitlines()[-1])["n"] > 0
    done = run(f"python test.py {others_pictures}/validation_data/cat {flags} --output {tmp_path}/names.csv", code=0)
    monkeypatch.setattr(sys, "argv", ["merge_lora.py", str(trained.out), "--merge", str(tmp_path / "plain")])
    merge_lora.main()
    assert f"sh validation.sh --model_name_or_path {tmp_path}/plain" in capsys.readouterr().out
    with pytest.raises(UserError, match="found files there; expected a new folder"):
        merge_lora.main()


def test_what_cannot_be_trained_is_refused(hub, trained, run, tmp_path):
    def refused(message, model, *flags, zero_stage=0):
        _, _, model_args, _ = parse(["--output_dir", "x", "--model_name_or_path", str(model), *flags])
        with pytest.raises(UserError, match=message):
            load_for_training(model_args, SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=zero_stage)))

    refused("quantized weights cannot be trained; add --use_peft", hub, "--load_in_4bit")
    message = "ZeRO-3 cannot partition quantized weights; add --config_file scripts/ddp.yaml"
    refused(message, hub, "--load_in_4bit", "--use_peft", zero_stage=3)
    refused(r"found an adapter; .* `python scripts/merge_lora.py \S+ --merge OUT`", trained.out)
    with pytest.raises(UserError, match="found no adapter_config.json"):
        merge_lora.merge(str(hub), str(tmp_path / "out"))
    lonely = shutil.copytree(trained.out, tmp_path / "lonely")
    settings = json.loads((lonely / "adapter_config.json").read_text())
    replica.dump(lonely / "adapter_config.json", settings | {"base_model_name_or_path": "gone"})
    assert "found an adapter to the base model 'gone', which is not there" in check_files(lonely)[0]
    done = run("sh train.sh --config_file scripts/none.yaml", code=2)
    assert "expected scripts/deepspeed_zero3.yaml, scripts/ddp.yaml" in done.output
