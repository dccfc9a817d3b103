"""--train_parts: the named parameters change, all others stay the same bit for bit; with ZeRO-3 and without.

Also beside LoRA adapters.
"""

import csv
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaNextConfig

from animals.checkpoint.check import check_files
from animals.command import UserError
from animals.files import read_json
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
    with pytest.raises(UserError, match="found language,attention; expected one of them"):
        read_parts("vision,language,attention")
    done, _, _ = train("--config_file scripts/ddp.yaml --dry_run")
    assert done.code == 2 and "would train all weights without ZeRO-3; expected ZeRO-3" in done.output, done.output
    assert "Traceback" not in done.output
    for flags, said in (
        ("--use_peft --train_parts language,vision", "found language with --use_peft; expected vision"),
        (
            "--use_peft --train_parts vision --lora_target_modules all-linear",
            "found --lora_target_modules with --use_peft",
        ),
        ("--train_parts none", "--train_parts none: found no --use_peft"),
    ):
        done, _, _ = train(f"{flags} --dry_run")
        assert done.code == 2 and done.output.count("error: ") == 1 and said in done.output, done.output[-3000:]


def test_every_parameter_is_of_one_part_and_clips_last_layer_never_trains(demo):
    config, names = LlavaNextConfig.from_pretrained(demo.model), weights(demo.model)
    owners = {name: [part for part in PARTS if trains(name, [part], config)] for name in names}
    none = {name for name, parts in owners.items() if not parts}
    assert all(len(parts) <= 1 for parts in owners.values())
    assert len(none) == 18 and all("post_layernorm" in name or ".layers.3." in name for name in none)
    attention = {name for name in names if trains(name, ["attention"], config)}
    assert len(attention) == 8 and all(owners[name] == ["language"] and "_proj.weight" in name for name in attention)
    assert owners["model.image_newline"] == ["projector"] and owners["lm_head.weight"] == ["language"]


WHOLE = "base_model.model."
LORA = "--use_peft --train_parts vision,projector --learning_rate 1e-3 --vision_learning_rate 1e-3 --max_steps 4 "
LORA += "--save_steps 2 --eval_steps 4 --eval_pictures 40"


@pytest.fixture(scope="module", params=["zero3", "ddp"])
def beside(request, demo, run, tmp_path_factory):
    """Four steps of adapters and whole parts on 2 ranks; DDP computes in bfloat16, the parts' weights are float32."""
    ddp, out = request.param == "ddp", tmp_path_factory.mktemp(request.param) / "sft"
    data = f"--input_dir {demo.input} --temp_dir {demo.cache} --logging_dir {out.parent}/logs"
    command = f"sh train.sh {data} {STEPS} {LORA} --model_name_or_path {demo.checkpoint} --output_dir {out}"
    command += " --config_file scripts/ddp.yaml" * ddp
    ways = {"NUM_PROCESSES": 2, "BF16_ON_CPU": int(ddp)}
    done = run(command, code=0, **ways)
    return SimpleNamespace(out=out, data=data, command=command, ways=ways, ddp=ddp, output=done.output)


def test_parts_train_whole_beside_adapters_and_are_saved_with_them(beside, demo):
    config, before = LlavaNextConfig.from_pretrained(demo.checkpoint), weights(demo.checkpoint)
    saved = load_file(beside.out / "adapter_model.safetensors")
    whole = {name.removeprefix(WHOLE): value for name, value in saved.items() if "lora_" not in name}
    before = {name.replace("vision_tower.vision_model.", "vision_tower."): value for name, value in before.items()}
    assert whole.keys() == {name for name in before if trains(name, ["vision", "projector"], config)}
    assert {value.dtype for value in whole.values()} == {torch.bfloat16 if beside.ddp else torch.float32}
    assert not [name for name, value in whole.items() if torch.equal(value, before[name].to(value.dtype))]
    assert f"{len(saved)} tensors, " in beside.output and "parts: adapters, vision, projector" in beside.output
    assert check_files(beside.out) == [] and not list(beside.out.rglob("model*.safetensors"))


def test_what_is_loaded_and_merged_is_what_was_evaluated(beside, demo, run, tmp_path):
    """validation.sh finds the accuracy and the loss that the trainer measured."""
    where, found = f"{beside.data} --on_eval_pictures --eval_pictures 40 --report_dir {tmp_path}", []
    run(f"python scripts/merge_lora.py {beside.out} --merge {tmp_path}/merged --dtype float32", code=0)
    for folder in (beside.out, tmp_path / "merged"):
        run(f"sh validation.sh {where} --model_name_or_path {folder}", code=0)
        with open(tmp_path / folder.name / "predictions.csv", newline="") as file:
            found.append([float(row[row["label"]]) * float(row["labels_mass"]) for row in csv.DictReader(file)])
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    report = read_json(tmp_path / "sft" / "report.json")
    logs = read_json(beside.out / "checkpoint-4" / "trainer_state.json")["log_history"]
    first, last = (log for log in logs if "eval_loss" in log)
    loss = -sum(map(math.log, found[0])) / 40 / 2  # tokens of an answer
    assert abs(first["eval_loss"] - last["eval_loss"]) > 0.01
    assert loss == pytest.approx(last["eval_loss"], abs=3e-3 if beside.ddp else 1e-5)
    assert report["accuracy"] == pytest.approx(last["eval_accuracy"], abs=0.03 if beside.ddp else 1e-9)
    names = f"{demo.input}/validation_data/cat --output {tmp_path}/names.csv"
    run(f"python test.py {names} --model_name_or_path {beside.out}", code=0)
    with open(tmp_path / "names.csv", newline="") as file:
        named = {Path(row["image"]).name: float(row["probability"]) for row in csv.DictReader(file)}
    with open(tmp_path / "sft" / "predictions.csv", newline="") as file:
        cats = [row for row in csv.DictReader(file) if row["label"] == "cat"]
    assert cats and all(float(row["probability"]) == pytest.approx(named[Path(row["image"]).name]) for row in cats)


def test_adapters_and_parts_resume_to_the_bit(beside, run):
    file = beside.out / "adapter_model.safetensors"
    before = file.read_bytes()
    shutil.rmtree(beside.out / "checkpoint-4")
    file.unlink()
    done = run(beside.command, code=0, **beside.ways)
    assert f"resuming from {beside.out}/checkpoint-2" in done.output
    assert file.read_bytes() == before


def test_a_damaged_file_of_adapters_and_parts_is_one_line(beside, tmp_path):
    folder = shutil.copytree(beside.out, tmp_path / "sft")
    file, newline = folder / "adapter_model.safetensors", f"{WHOLE}model.image_newline"
    values = load_file(beside.out / file.name)
    for harm in ({newline: values[newline][:-1].clone()}, {f"{newline}s": values[newline].clone()}):
        save_file(values | harm, file)
        (line,) = check_files(folder)
        assert f"found {[*harm][0]}; expected names and shapes as in " in line
    file.write_bytes(file.read_bytes()[:-1])
    (line,) = check_files(folder)
    assert "although its header says" in line
