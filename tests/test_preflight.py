"""What is wrong is said before anything slow starts, all of it in one message.

The checkpoint's own faults (shards cut short or missing, another model's type, no tokenizer) are in test_checkpoint.py,
leaks and bad pictures in test_data.py, labels with the same tokens in test_scorer.py, resuming in test_survive.py.
"""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from transformers import LlavaNextConfig

from animals.command import UserError
from animals.scoring.scorer import Scorer
from animals.training import memory as memory_plan
from animals.training.preflight import check_checkpoint, check_disk, check_memory, check_output_dir
from config import Config


def test_three_problems_in_one_message(demo, run, tmp_path):
    model, pictures, out = tmp_path / "model", tmp_path / "input", tmp_path / "out"
    shutil.copytree(demo.model, model)
    shard = next(model.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    shutil.copytree(demo.input, pictures)
    leaked = next((pictures / "train_data" / "cat").iterdir())
    shutil.copy(leaked, pictures / "validation_data" / "cat" / "again.jpg")
    out.mkdir()
    (out / "thesis.tex").touch()
    command = f"sh train.sh --model_name_or_path {model} --input_dir {pictures} --temp_dir {tmp_path}/temp"
    done = run(f"{command} --output_dir {out}", timeout=60)
    assert done.code == 2 and "Traceback" not in done.output
    errors = [line for line in done.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3, done.output
    assert shard.name in errors[0] and "header" in errors[0]
    assert "identical" in errors[1] and "--allow_leaks" in errors[1]
    assert "thesis.tex" in errors[2]
    assert "torch" not in done.output


def test_before_anything_is_installed(tmp_path):
    """python -S: no site-packages, as in a clone before `pip install`."""
    command = [sys.executable, "-S", "scripts/launch.py", "train.py", "--model_name_or_path", str(tmp_path / "model")]
    done = subprocess.run([*command, "--input_dir", str(tmp_path / "input")], capture_output=True, text=True)
    errors = done.stderr.splitlines()
    assert done.returncode == 2 and len(errors) == 4 and all(line.startswith("error: ") for line in errors)
    assert "pip install -r requirements.txt" in errors[0]
    assert "model/config.json" in errors[1] and "input/train_data" in errors[2]


def test_more_ranks_than_gpus(run):
    done = run("sh train.sh", NUM_PROCESSES=4, CUDA_VISIBLE_DEVICES="0,1")
    assert done.code == 2
    assert (
        done.output.strip()
        == "error: NUM_PROCESSES: found '4'; expected a whole number from 1 to 2, the GPUs there are"
    )


def test_a_plan_over_the_gpus_memory():
    with open(os.path.join(os.path.dirname(__file__), "hub_config.json")) as file:
        config = LlavaNextConfig(**json.load(file))
    zero3 = memory_plan.load_zero3("scripts/zero3.json")
    plan = memory_plan.plan(config, zero3, 4, 4, 4)
    args = SimpleNamespace(per_device_train_batch_size=4)
    check_memory(args, plan, 24.0)
    with pytest.raises(
        UserError, match=r"found GPUs of 16.0 GiB; expected 22\.\d GiB for --per_device_train_batch_size 4"
    ):
        check_memory(args, plan, 16.0)


def test_a_tokenizer_that_cannot_be_used(demo, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(demo.model, model)
    (model / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read"):
        check_checkpoint(str(model), Config(), Scorer)


def test_an_output_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written to"):
        check_output_dir(str(tmp_path / "file" / "sft"))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_small_disk(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        args = SimpleNamespace(
            output_dir=str(tmp_path / "sft"), save_only_model=False, save_total_limit=2, save_strategy="steps"
        )
        check_disk(args, 200_000)  # 4 checkpoints of 1.6 MB and 0.4 MB
        with pytest.raises(UserError, match=r"found 0.0 GiB free; expected 0.0 GiB for 4 checkpoints"):
            check_disk(args, 300_000)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
