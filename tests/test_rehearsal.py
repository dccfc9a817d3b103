"""`sh train.sh --rehearse` leaves its figures and nothing else; the run after it is the same as without it."""

import json
import random
import re
import shutil
import signal
import subprocess
import time

import pytest
import torch

from animals.checkpoint.steps import delete_old_rehearsal
from animals.command import UserError
from animals.training import rehearsal
from animals.training.batches import heaviest_micro_batch
from animals.training.preflight import check_output_dir
from tests.test_survive import command as training
from tests.test_survive import run_until

KEYS = {"seconds_per_step", "waiting_for_data", "hours", "gpus", "host_gib", "checkpoint", "versions"}


def command(demo, out, *more):
    flags = "--max_steps 3 --save_steps 2 --eval_strategy steps --eval_steps 2 --eval_pictures 20 "
    flags += "--per_device_train_batch_size 4 --gradient_accumulation_steps 2"
    return training(demo, out, flags, *more)


def figures(out):
    """The content of rehearsal.json, beside which nothing was left."""
    assert not out.exists() and not out.with_name("sft.rehearsal").exists()
    assert sorted(path.name for path in out.with_name("sft-logs").rglob("*")) == ["rehearsal.json", "sft"]
    found = json.loads((out.with_name("sft-logs") / "sft" / "rehearsal.json").read_text())
    assert found.keys() == KEYS and found["gpus"] == [] and found["hours"] > 0 < found["seconds_per_step"]
    assert 0 <= found["waiting_for_data"] < 1 and found["versions"]["torch"].startswith(torch.__version__[:4])
    return found


PHASES = (  # beginnings of lines, in order
    "effective batch", "rehearsal: evaluation", "rehearsal: a first step", "rehearsal: a step on the heaviest",
    "rehearsal: the run's own", "rehearsal: a checkpoint is written", "rehearsal: the checkpoint is read", "median of",
)  # fmt: skip


def test_the_run_after_a_rehearsal_is_the_run_without_one(demo, run, tmp_path):
    outs = tmp_path / "rehearsed" / "sft", tmp_path / "plain" / "sft"
    done = run(command(demo, outs[0], "--rehearse"), NUM_PROCESSES=2, code=0)
    assert re.search(".*\\n".join(PHASES), done.output, re.DOTALL), done.output[-3000:]
    found = figures(outs[0])
    assert found["host_gib"].keys() == {"start", "training", "resume"} and min(found["host_gib"].values()) > 0
    assert found["host_gib"]["training"] > found["host_gib"]["start"]
    assert found["host_gib"]["resume"] < found["host_gib"]["training"] * 0.9  # without training's own
    counts = [row["image_tokens"] for row in json.loads((demo.cache / "train.json").read_text())]
    heaviest = heaviest_micro_batch(counts, 4, 2, 2)
    longest = max(counts[i] for i in heaviest)
    assert f"of the run: {len(heaviest)} pictures, the longest of {longest} image tokens" in done.output
    assert "learned in the example below: 2\n" in done.output  # the label, one token in the demo, and </s>
    assert re.search(rf"waiting_for_data +{float(format(found['waiting_for_data'], '.3g'))}\n", done.output)
    evaluations, checkpoints = re.search(r"3 steps, (\d+) evaluations, (\d+) checkpoints in all", done.output).groups()

    for out in outs:
        done = run(command(demo, out), NUM_PROCESSES=2, code=0)
    assert done.output.count("'eval_accuracy'") == int(evaluations)
    saved = list(outs[0].glob("checkpoint-*"))
    assert len(saved) == int(checkpoints)
    size = sum(path.stat().st_size for path in saved[0].rglob("*") if path.is_file()) / 1e9
    assert found["checkpoint"]["gb"] == pytest.approx(size, rel=0.05)
    assert min(found["checkpoint"][key] for key in ("seconds_to_write", "seconds_to_read")) > 0
    ours, theirs = ((out / "model.safetensors").read_bytes() for out in outs)
    assert ours == theirs


@pytest.mark.parametrize("flag", ["--rehearse", ""])
def test_the_optimizer_has_its_states_before_the_heaviest_step(demo, run, tmp_path, flag):
    """8-bit AdamW makes them in its first step: a rehearsal without them would measure too little memory."""
    flags = command(demo, tmp_path / "sft", flag, "--save_strategy no --eval_strategy no").partition("train.sh ")[2]
    launch = "accelerate launch --config_file scripts/deepspeed_zero3.yaml --num_processes 2 --main_process_port 0 "
    flags += " --optim adamw_bnb_8bit --train_sampling_strategy batch_rebalance --use_cpu --num_train_epochs 1"
    done = run(f"{launch} tests/helpers/states_probe.py {flags}", code=0)
    found = [tuple(map(int, row)) for row in re.findall(r"step (\d+) (\d+) states (\d+) tokens", done.output)]
    heaviest = max(tokens for _, _, tokens in found)
    assert {(step, bool(states)) for step, states, _ in found if step < 2} == {(0, False), (1, True)}
    assert heaviest in [tokens for step, _, tokens in found if step == 1]


def test_adapters_without_deepspeed_in_random_order(demo, run, tmp_path):
    flags = "--rehearse --use_peft --config_file scripts/ddp.yaml --train_sampling_strategy random"
    done = run(command(demo, tmp_path / "sft", flags), code=0)
    found = figures(tmp_path / "sft")
    assert found["checkpoint"]["seconds_to_read"] > 0
    counts = [row["image_tokens"] for row in json.loads((demo.cache / "train.json").read_text())]
    assert f"4 pictures, the longest of {max(counts)} image tokens" in done.output


def test_a_run_that_saves_nothing_rehearses_no_checkpoint(demo, run, tmp_path):
    flags = "--rehearse --save_strategy no --eval_strategy no --eval_on_start False --max_steps 1"
    (tmp_path / "sft-logs" / "sft").mkdir(parents=True)  # an earlier rehearsal's
    run(command(demo, tmp_path / "sft", flags), code=0)
    found = figures(tmp_path / "sft")
    assert found["checkpoint"] is None and found["host_gib"]["resume"] is None
    assert found["hours"] == pytest.approx(found["seconds_per_step"] / 3600)


@pytest.mark.parametrize(("ranks", "first"), [pytest.param(1, 5, marks=pytest.mark.slow), (2, 6)])
def test_killed_in_any_phase_the_next_start_is_clean(demo, run, tmp_path, request, ranks, first):
    """kill -9 and SIGTERM in turn; the first while the checkpoint is written or read, the others in the next phases."""
    out, folder, rng = tmp_path / "sft", tmp_path / "sft.rehearsal", random.Random(ranks)
    for kill in range(request.config.getoption("--kills")):
        number = (signal.SIGKILL, signal.SIGTERM)[kill % 2]

        def end(process, number=number, first=not kill):
            while first and not list(folder.glob("checkpoint-*")) and process.poll() is None:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.02 if first else 2))
            process.send_signal(number)

        phase = PHASES[(first + kill) % len(PHASES)]
        code, output = run_until(phase, command(demo, out, "--rehearse"), end, NUM_PROCESSES=ranks)
        # 0: the rehearsal was faster than the signal; negative: the launcher had no ranks any more
        assert code in (0, 128 + number, -number), output[-3000:]
        assert not out.exists() and not (code == 0 and folder.exists())
        assert kill or folder.exists(), "the next start has something to delete"
        if code == 128 + signal.SIGTERM:
            assert "SIGTERM: the run has ended; there was nothing to save" in output and not folder.exists()
    run(command(demo, out, "--dry_run"), code=0)
    assert not folder.exists() and not out.exists()


def test_a_folder_of_that_name_is_left_alone(demo, run, tmp_path):
    folder = tmp_path / "sft.rehearsal"
    (folder / "checkpoint-3").mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    done = run(command(demo, tmp_path / "sft", "--rehearse"))
    assert done.code == 2 and f"{folder}: found checkpoint-3, run.json in it; expected no such folder" in done.output
    assert len(list(folder.iterdir())) == 2


def test_only_what_a_rehearsal_leaves_is_swept(tmp_path):
    folder = tmp_path / "sft.rehearsal"
    for name, stays in (("notes", True), (".saving", True), ("checkpoint-3", False)):
        (folder / name).mkdir(parents=True)
        (folder / "README.md").touch()
        for _ in range(2):
            delete_old_rehearsal(str(tmp_path / "sft/"))
            assert folder.exists() == stays
        shutil.rmtree(folder, ignore_errors=True)


def test_the_folder_of_a_running_rehearsal_is_not_swept(tmp_path):
    folder = tmp_path / "sft.rehearsal"
    (folder / "checkpoint-3").mkdir(parents=True)
    holder = subprocess.Popen(["flock", str(folder), "sh", "-c", "echo held; read end"], stdin=-1, stdout=-1, text=True)
    assert holder.stdout.readline() == "held\n"
    for refused in (delete_old_rehearsal, check_output_dir):
        with pytest.raises(UserError, match="sft.rehearsal: found another run that writes to it"):
            refused(str(tmp_path / "sft"))
    holder.communicate("")
    delete_old_rehearsal(str(tmp_path / "sft"))
    assert not folder.exists()


def test_hours_by_hand():
    checkpoint = {"gb": 60.0, "seconds_to_write": 40.0}  # nine of them, and a quarter of one for the final model
    hours = rehearsal.hours_of_run(100, 3, 9, 30.0, 60.0, checkpoint, weights_gb=15.0)
    assert hours == pytest.approx((3000 + 180 + 370) / 3600)
    assert rehearsal.hours_of_run(100, 3, 0, 30.0, 60.0, None, None) == pytest.approx(3180 / 3600)


def test_too_little_memory_is_one_line():
    line = rehearsal.out_of_memory(UserError("CUDA out of memory. Tried\nmore"), "4 pictures", "during")
    assert "(CUDA out of memory. Tried)" in line and "(4 pictures; memory ran out during this step)" in line
    assert "halve --per_device_train_batch_size" in line
