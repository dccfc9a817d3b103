"""Every documented way to train, from end to end with train.sh, on real ranks with the tiny model.

Launch recipe x ranks x method x sampling: each run is evaluated before step 1, trains, is evaluated and saved at each
step, is killed with -9, is started again, and its model is validated and used; an adapter is also merged.
"""

import csv
import json
import time

import pytest

from animals.checkpoint.check import check_files, check_weights
from animals.checkpoint.steps import missing_files
from tests.conftest import start

LORA = "--use_peft --lora_r 4"
DDP = "--config_file scripts/ddp.yaml"
PATHS = {  # every pair of values from two columns is here at least once
    "zero3-1-full-random": (1, "--train_sampling_strategy random"),
    "zero3-2-full-rebalance": (2, ""),
    "zero3-2-lora-random": (2, f"{LORA} --train_sampling_strategy random"),
    "zero3-1-lora-rebalance": (1, LORA),
    "ddp-1-lora-random": (1, f"{DDP} {LORA} --train_sampling_strategy random"),
    "ddp-2-lora-rebalance": (2, f"{DDP} {LORA}"),
    "ddp-1-qlora-rebalance": (1, f"{DDP} {LORA} --load_in_4bit"),
    "zero3-2-whole-rebalance": (2, ""),  # of a folder that scripts/whole_view.py has written
    "ddp-1-projector-rebalance": (1, f"{DDP} --train_parts projector"),
    "ddp-2-qlora-random": (2, f"{DDP} {LORA} --load_in_4bit --train_sampling_strategy random"),
}
STEPS = (
    "--eval_on_start --eval_steps 1 --save_steps 1 --max_steps 3 --eval_pictures 6 --logging_steps 1 "
    "--per_device_train_batch_size 2 --gradient_accumulation_steps 2 --per_device_eval_batch_size 4"
)


DAILY = "zero3-2-full-rebalance", "zero3-2-whole-rebalance", "ddp-1-projector-rebalance", "ddp-2-qlora-random"


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in DAILY)) for name in PATHS])
def test_path(name, demo, others_pictures, run, tmp_path):
    ranks, flags = PATHS[name]
    out, data, model = tmp_path / "out", f"--input_dir {others_pictures} --temp_dir {tmp_path}/cache", demo.model
    if "whole" in name:
        model = tmp_path / "model-whole"
        assert run(f"python scripts/whole_view.py {demo.model} {model}").code == 0
    command = (
        f"sh train.sh {data} --model_name_or_path {model} --output_dir {out} --logging_dir {tmp_path}/logs "
        f"{STEPS} {flags}"
    )
    first = start(command, NUM_PROCESSES=ranks)
    while missing_files(out / "checkpoint-1") and first.poll() is None:
        time.sleep(0.1)
    first.kill()  # with -9; the ranks end with their launcher
    output, _ = first.communicate()
    assert not missing_files(out / "checkpoint-1"), output[-4000:]

    done = run(command, NUM_PROCESSES=ranks)
    assert done.code == 0, done.output[-4000:]
    assert f"resuming from {out}/checkpoint-" in done.output
    state = json.loads((out / "checkpoint-3" / "trainer_state.json").read_text())
    evaluated = [log["step"] for log in state["log_history"] if "eval_accuracy" in log]
    assert evaluated == [0, 1, 2, 3], "before step 1 and after each step, and not again after the resume"

    path = str(out)
    if "lora" in name:
        assert check_files(out) == [] and not list(out.glob("model*.safetensors"))
        path = str(tmp_path / "merged")
        done = run(f"python scripts/merge_lora.py {out} --merge {path}")
        assert done.code == 0, done.output[-3000:]
    assert check_weights(path) == []

    scored = []
    for folder in dict.fromkeys([str(out), path]):  # an adapter as it is, and merged
        done = run(f"sh validation.sh {data} --model_name_or_path {folder} --report_dir {tmp_path}/reports")
        assert done.code == 0, done.output[-3000:]
        scored.append(json.loads(done.output.strip().splitlines()[-1])["n"])
    assert set(scored) == {21}
    done = run(
        f"python test.py {others_pictures}/validation_data --model_name_or_path {path} --output {tmp_path}/n.csv"
    )
    assert done.code == 0, done.output[-3000:]
    with open(tmp_path / "n.csv", newline="") as file:
        assert len([row for row in csv.DictReader(file) if row["prediction"] and not row["error"]]) == 21


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (DDP, "scripts/deepspeed_zero3.yaml"),  # all weights with DDP: no float32 master weights
        (f"{LORA} --load_in_4bit", "scripts/ddp.yaml"),  # ZeRO-3 cannot partition 4-bit weights
        (f"{DDP} --load_in_4bit", "--use_peft"),
    ],
)
def test_what_cannot_work_is_one_line(flags, said, demo, run, tmp_path):
    done = run(
        f"sh train.sh --input_dir {demo.input} --temp_dir {demo.cache} --model_name_or_path {demo.model} "
        f"--output_dir {tmp_path}/out --logging_dir {tmp_path}/logs --max_steps 1 {flags}"
    )
    errors = [line for line in done.output.splitlines() if line.startswith("error")]
    assert done.code == 2 and len(errors) == 1 and said in errors[0] and "Traceback" not in done.output, done.output
