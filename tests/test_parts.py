"""--train_parts: the named parameters change, all others stay the same bit for bit; with ZeRO-3 and without."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaNextConfig

from animals.command import UserError
from animals.training.parts import PARTS, TRAINED, read_parts, trains

STEPS = "--per_device_train_batch_size 2 --gradient_accumulation_steps 1 --logging_steps 1 --learning_rate 1e-2"
STEPS += " --vision_learning_rate 1e-2"
STEPS += " --warmup_ratio 0 --max_steps 2 --dtype bfloat16 --bf16 True --eval_pictures 10 --eval_steps 2"
IN_MEMORY = (("language_model.lm_head.", "lm_head."), ("language_model.model.", "model.language_model."))


@pytest.fixture
def train(demo, run, tmp_path):
    """Run two steps in bfloat16 on 2 ranks -> (done, the command, its folder)."""

    def start(flags):
        out = tmp_path / "sft"
        command = f"sh train.sh --input_dir {demo.input} --temp_dir {demo.cache} --logging_dir {tmp_path}/logs {STEPS} "
        command += f"--model_name_or_path {demo.model} --output_dir {out} {flags}"
        return run(command, NUM_PROCESSES=2, BF16_ON_CPU=1), command, out

    return start


def weights(folder):
    """{parameter name in the model: value}"""
    values = {}
    for file in sorted(folder.glob("model*.safetensors")):
        values |= load_file(file)
    for old, new in IN_MEMORY:
        values = {new + name.removeprefix(old) if name.startswith(old) else name: v for name, v in values.items()}
    return {name if name.startswith(("model.", "lm_head.")) else f"model.{name}": v for name, v in values.items()}


@pytest.mark.parametrize(
    ("parts", "launch"),
    [
        ("projector", ""),
        ("vision,language", ""),
        ("projector", "--config_file scripts/ddp.yaml"),
        ("vision,projector", "--config_file scripts/ddp.yaml"),
        ("language", "--config_file scripts/ddp.yaml"),
        ("attention", ""),
        ("projector,attention", "--config_file scripts/ddp.yaml"),
    ],
)
def test_named_parts_change_and_the_others_do_not(train, demo, parts, launch):
    done, _, out = train(f"--train_parts {parts} --save_strategy no {launch}")
    assert done.code == 0 and "eval_accuracy" in done.output, done.output[-3000:]
    config, before, after = LlavaNextConfig.from_pretrained(demo.model), weights(demo.model), weights(out)
    assert {value.dtype for value in after.values()} == {torch.bfloat16}
    changed = {name for name, value in after.items() if not torch.equal(value, before[name].to(torch.bfloat16))}
    named = {name for name in after if trains(name, read_parts(parts), config)}
    assert named and changed == named, sorted(changed ^ named)


@pytest.mark.slow
def test_projector_without_zero3_resumes_to_the_bit(train, run):
    """A resumed run reads the float32 weights, not the bfloat16 ones that other programs read."""
    flags = "--train_parts projector --config_file scripts/ddp.yaml --save_steps 1 --eval_strategy no"
    done, command, out = train(flags)
    assert done.code == 0, done.output[-3000:]
    assert (out / "checkpoint-1" / TRAINED).is_file() and not (out / TRAINED).exists()
    last = load_file(out / "checkpoint-2" / TRAINED)
    assert {value.dtype for value in last.values()} == {torch.float32}
    before = (out / "model.safetensors").read_bytes()
    shutil.rmtree(out / "checkpoint-2")
    (out / "model.safetensors").unlink()
    done = run(command, NUM_PROCESSES=2, BF16_ON_CPU=1, code=0)
    assert f"resuming from {out}/checkpoint-1" in done.output, done.output[-3000:]
    assert (out / "model.safetensors").read_bytes() == before
    again = load_file(out / "checkpoint-2" / TRAINED)
    assert all(torch.equal(again[name], value) for name, value in last.items())


def test_what_cannot_work_is_one_line(train):
    with pytest.raises(UserError, match="--train_parts: found 'head'; expected some of vision,projector,language"):
        read_parts("head,projector")
    assert read_parts("language,vision") == ["vision", "language"]
    with pytest.raises(UserError, match="found language,attention; expected one of the two"):
        read_parts("vision,language,attention")
    done, _, _ = train("--config_file scripts/ddp.yaml --dry_run")
    assert done.code == 2 and "would train all weights without ZeRO-3; expected ZeRO-3" in done.output, done.output
    assert "Traceback" not in done.output
    done, _, _ = train("--use_peft --train_parts projector --dry_run")
    assert done.code == 2 and "give one of the two" in done.output, done.output[-3000:]


def test_every_parameter_is_of_one_part_and_clips_last_layer_never_trains(demo):
    config, names = LlavaNextConfig.from_pretrained(demo.model), weights(demo.model)
    owners = {name: [part for part in PARTS if trains(name, [part], config)] for name in names}
    none = {name for name, parts in owners.items() if not parts}
    assert all(len(parts) <= 1 for parts in owners.values())
    assert len(none) == 18 and all("post_layernorm" in name or ".layers.3." in name for name in none)
    attention = {name for name in names if trains(name, ["attention"], config)}
    assert len(attention) == 8 and all(owners[name] == ["language"] and "_proj.weight" in name for name in attention)
    assert owners["model.image_newline"] == ["projector"] and owners["lm_head.weight"] == ["language"]
