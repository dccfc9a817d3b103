"""What is wrong is reported before anything slow starts, all of it in one message.

Faults of the checkpoint's files are in test_checkpoint.py, bad pictures in test_cache.py, labels with the same tokens
in test_scorer.py, resuming in test_survive.py.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from transformers import TrainerControl, TrainingArguments
from transformers.trainer_callback import DefaultFlowCallback, TrainerState

from animals.command import Findings, UserError
from animals.ranks import choose_arithmetic, why_cpu
from animals.training import describe, preflight
from animals.training.parts import ALL
from animals.training.preflight import check_disk, check_host_ram, check_output_dir, saved_bytes, usable_ram
from scripts.launch import read_flags, usable_gpus
from tests.conftest import ROOT
from tests.helpers import replica


@pytest.fixture
def without_torch(tmp_path):
    """A PYTHONPATH on which importing torch ends the command: what needs none is said before that."""
    (tmp_path / "path" / "torch").mkdir(parents=True)
    (tmp_path / "path" / "torch" / "__init__.py").write_text("raise SystemExit('torch was imported')")
    (tmp_path / "path" / "torch" / "version.py").write_text("cuda = None")
    return tmp_path / "path"


def test_three_problems_in_one_message(demo, run, tmp_path, without_torch):
    model, pictures = shutil.copytree(demo.model, tmp_path / "m"), shutil.copytree(demo.input, tmp_path / "input")
    out, shard = tmp_path / "out", next(model.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    leaked = next((pictures / "train_data" / "cat").iterdir())
    shutil.copy(leaked, pictures / "validation_data" / "cat" / "again.jpg")
    out.mkdir()
    (out / "thesis.tex").touch()
    command = f"sh train.sh --model_name_or_path {model} --input_dir {pictures} --temp_dir {tmp_path}/temp"
    done = run(f"{command} --output_dir {out}", PYTHONPATH=without_torch)
    assert done.code == 2 and "Traceback" not in done.output
    errors = [line for line in done.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3, done.output
    assert shard.name in errors[0] and "header" in errors[0]
    assert "identical" in errors[1] and "--allow_leaks" in errors[1]
    assert "thesis.tex" in errors[2]
    assert "torch" not in done.output


def test_torch_is_missed_where_it_is_needed(demo, run, without_torch):
    where = f"--model_name_or_path {demo.model} --input_dir {demo.input} --temp_dir {demo.cache}"
    assert "torch was imported" in run(f"sh validation.sh {where}", PYTHONPATH=without_torch).output


def test_before_anything_is_installed(tmp_path):
    """python -S: no site-packages, as in a clone before `pip install`."""
    command = [sys.executable, "-S", "scripts/launch.py", "train.py", "--model_name_or_path", str(tmp_path / "model")]
    done = subprocess.run([*command, "--input_dir", str(tmp_path / "input")], capture_output=True, text=True)
    errors = done.stderr.splitlines()
    assert done.returncode == 2 and len(errors) == 4 and all(line.startswith("error: ") for line in errors)
    assert "model: found no config.json" in errors[0] and "hf download" in errors[0]
    assert "pip install -r requirements.txt" in errors[1] and "input/validation_data" in errors[3]
    assert "input/train_data" in errors[2] and "--input_dir" in errors[2]


def test_more_ranks_than_gpus(run):
    done = run("sh train.sh", NUM_PROCESSES=4, CUDA_VISIBLE_DEVICES="0,1")
    line = "error: NUM_PROCESSES: found '4'; expected a whole number from 1 to 2, the GPUs there are\n"
    assert (done.code, done.output) == (2, line)


SEVEN = {"lm_head.weight": (7_566_747_648,)}  # parameters of the 7B


def arguments(output_dir="somewhere", **changed):
    """179 steps of 64 pictures on 4 GPUs, with train.sh's flags for saving."""
    args = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "world_size": 4, "max_steps": -1}
    args |= {"num_train_epochs": 1, "dataloader_drop_last": False, "output_dir": str(output_dir)}
    args |= {"save_strategy": "steps", "save_steps": 100, "save_total_limit": 5, "save_only_model": False}
    args |= {"eval_strategy": "steps", "eval_steps": 100, "eval_delay": 0, "eval_on_start": True}
    args |= {"load_best_model_at_end": False, "train_sampling_strategy": "random"}
    return SimpleNamespace(**{**args, **changed})


def model_arguments(**changed):
    lora = {"use_peft": False, "lora_r": 16, "lora_modules_to_save": None}
    return SimpleNamespace(**{"dtype": "bfloat16", **lora, **changed})


@pytest.mark.parametrize(
    ("changed", "at_once", "gigabytes"),  # 60.84 a checkpoint (8.04 bytes a parameter), 15.13 the model
    [
        ({}, 2, 136.81),  # step 100 and the last; then the model
        ({"save_steps": 0.1}, 6, 365.02),  # five are kept while the sixth is written
        ({"save_steps": 10, "save_total_limit": None}, 18, 1110.19),
        ({"save_steps": 10, "save_total_limit": 1}, 2, 121.67),
        ({"save_steps": 10, "save_total_limit": 1, "load_best_model_at_end": True}, 3, 182.51),
        ({"save_strategy": "no"}, 0, 15.13),
        ({"save_strategy": "epoch", "num_train_epochs": 3}, 3, 197.64),
        ({"save_only_model": True}, 2, 45.40),
        ({"max_steps": 100}, 1, 75.97),
        ({"save_strategy": "best", "save_total_limit": None}, 2, 136.81),  # at most: of all but the untuned
    ],
)
def test_disk_for_what_a_run_will_save(changed, at_once, gigabytes):
    args = arguments(**changed)
    checkpoint, final = saved_bytes(args, model_arguments(), SEVEN, ALL)
    kept, needed = preflight.disk_needed(args, 11_446, checkpoint, final)
    assert (kept, round(needed / 1e9, 2)) == (at_once, gigabytes)
    assert final == 2 * 7_566_747_648


def test_steps_are_counted_as_the_library_does():
    """11,446 pictures are 716 micro-batches of 4 ranks x 4, the last one not full: 179 steps."""
    count = describe.count_steps
    assert count(arguments(), 11_446) == (179, 179) and count(arguments(num_train_epochs=1.5), 11_446) == (179, 269)
    assert count(arguments(max_steps=7), 11_446) == (179, 7) and count(arguments(), 3) == (1, 1)
    assert count(arguments(), 16 * 4 * 2 + 1)[0] == 3
    assert count(arguments(dataloader_drop_last=True), 191)[0] == 3
    assert count(arguments(dataloader_drop_last=True, train_sampling_strategy="batch_rebalance"), 191)[0] == 2


def events_of_the_library(args, per_epoch, steps):
    """(evaluations, saves) after each step, by asking transformers' own callback about every one of them."""
    flow, state, said = DefaultFlowCallback(), TrainerState(max_steps=steps), []
    state.compute_steps(args, steps)
    for step in range(1, steps + 1):
        state.global_step, state.epoch = step, step / per_epoch
        said.append(flow.on_step_end(args, state, TrainerControl()))
        if step % per_epoch == 0 or step == steps:
            said.append(flow.on_epoch_end(args, state, TrainerControl()))
    return sum(control.should_evaluate for control in said), sum(control.should_save for control in said)


@pytest.mark.parametrize("length", [{"num_train_epochs": 2.5}, {"num_train_epochs": 3}, {"max_steps": 7}], ids=str)
@pytest.mark.parametrize("delay", [0, 1, 2, 2.5, 3, 4, 20])
def test_events_are_counted_as_the_library_has_them(tmp_path, length, delay):
    """Four steps per epoch. The last step is evaluated and saved, too."""
    run = {"per_device_train_batch_size": 1, "use_cpu": True, "eval_delay": delay, **length}
    for interval in (1, 3, 4, 20, 0.1, 0.25, 0.3):
        for strategy in ("steps", "epoch", "no"):
            flags = {f"{name}_strategy": strategy for name in ("eval", "save")}
            flags |= {"eval_steps": interval, "save_steps": interval}
            args = TrainingArguments(str(tmp_path), **run, **flags)
            per_epoch, steps = describe.count_steps(args, 4)
            found = describe.count_events(args, 4)
            assert (per_epoch, found) == (4, events_of_the_library(args, per_epoch, steps)), flags
            args.save_strategy, args.eval_on_start = "best", True
            assert describe.count_events(args, 4) == (found[0] + 1, found[0]), "at most one per evaluation of the run"


def test_an_example_shows_what_is_learned():
    letters = SimpleNamespace(image_token_id=0, tokenizer=SimpleNamespace(decode=lambda ids: "".join(map(chr, ids))))
    ids, learned = [97, 0, 0, 0, 98, 99, 100], [-100, -100, -100, -100, -100, 99, 100]
    assert describe.mark(ids, learned, letters) == "a<image>x3b>>cd<<"


def test_disk_for_adapters_for_float32_and_for_the_parts_that_train():
    shapes = {"q_proj.weight": (4096, 4096), "v_proj.weight": (1024, 4096), "norm.weight": (4096,)}
    lora, adapters = model_arguments(use_peft=True), 16 * (8192 + 5120)
    assert saved_bytes(arguments(), lora, shapes, ALL) == (pytest.approx(8.04 * adapters), 2 * adapters)
    lora.lora_modules_to_save = ["norm"]
    assert saved_bytes(arguments(), lora, shapes, ALL)[1] == 2 * (adapters + 4096)
    assert saved_bytes(arguments(), model_arguments(dtype="float32"), SEVEN, ALL)[1] == 4 * 7_566_747_648
    shapes = {"vision_tower.a": (10,), "model.multi_modal_projector.b": (100,), "image_newline": (1000,)}  # old and new
    shapes["language_model.lm_head.c"] = (100, 100)
    for parts, trained in (("vision", 10), ("projector", 1100), ("projector,language", 11_100), (ALL, 11_110)):
        checkpoint, final = saved_bytes(arguments(), model_arguments(), shapes, parts)
        assert (checkpoint, final) == (pytest.approx(2 * 11_110 + 6.04 * trained), 2 * 11_110)


@pytest.mark.parametrize(
    ("dtype", "zero3", "ranks", "gib"),  # three GiB per rank; ZeRO-3: 14.1 of weights, and the ranks' share of them
    [("bfloat16", True, 4, 40.2), ("bfloat16", True, 2, 27.1), ("bfloat16", False, 4, 12), ("float32", True, 4, 68.4)],
)
def test_host_ram_to_load_the_weights(monkeypatch, dtype, zero3, ranks, gib):
    plugin = SimpleNamespace(zero_stage=3) if zero3 else None
    args, model_args = arguments(deepspeed_plugin=plugin, use_cpu=False), model_arguments(dtype=dtype)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setattr(preflight, "usable_ram", lambda: (gib + 0.1) * 2**30)
    check_host_ram(args, model_args, SEVEN)
    monkeypatch.setattr(preflight, "usable_ram", lambda: (gib - 0.1) * 2**30)
    with pytest.raises(UserError, match=f"GiB of RAM; expected {gib:.0f} GiB: {ranks} processes of 3 GiB and "):
        check_host_ram(args, model_args, SEVEN)
    args.use_cpu = True
    check_host_ram(args, model_args, SEVEN)


def test_foreign_output_folders_and_small_disks_are_refused_together(tmp_path):
    (tmp_path / "beach.jpg").touch()
    findings = Findings()
    findings.attempt(check_output_dir, str(tmp_path))
    findings.attempt(check_output_dir, str(tmp_path / "beach.jpg" / "sft"))
    findings.attempt(check_disk, arguments(tmp_path), 11_446, 8.03e13, 2e13)
    foreign, no_folder, small = findings
    assert "beach.jpg" in foreign and "where no file can be written" in no_folder
    assert "expected 168196.9 GiB for 2 checkpoints of 74785.2 GiB" in small


@contextlib.contextmanager
def disk(folder, size):
    """A disk of that many bytes at `folder`; skips the test where there is no right to mount one."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk is mounted by root alone, and not on every machine")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_small_disk(tmp_path):
    with disk(tmp_path, "8m"):
        args = arguments(tmp_path / "sft")
        check_disk(args, 11_446, 3.5e6, 0.9e6)  # 2 of these checkpoints
        with pytest.raises(UserError, match=r"found 0.0 GiB free; expected 0.0 GiB for 2 checkpoints"):
            check_disk(args, 11_446, 3.9e6, 0.9e6)
        (tmp_path / "sft").mkdir()
        (tmp_path / "sft" / "model.safetensors").write_bytes(bytes(4_000_000))  # an earlier run's, which goes
        check_disk(args, 11_446, 3.5e6, 0.9e6)


@pytest.mark.slow
def test_two_saves_of_the_7b_fit_on_137_gb(run, tmp_path):
    """179 steps, saved at 100 and the last: real shapes and files, on a disk of that size; up to the weights' load."""
    seven = replica.build(tmp_path / "seven", 32, 24, full_width=True, holes=True)
    replica.pictures(tmp_path / "input")
    flags = f"--input_dir {tmp_path}/input --temp_dir {tmp_path}/cache --model_name_or_path {seven} --use_cpu"
    command = f"sh train.sh {flags} --output_dir {tmp_path}/disk/sft --max_steps 179 --dry_run"
    for gigabytes, code in ((137, 0), (136, 2)):
        with disk(tmp_path / "disk", f"{gigabytes}000000000"):
            done = run(command, BF16_ON_CPU=1, code=code)
    assert "found 126.7 GiB free; expected 127.4 GiB for 2 checkpoints of 56.7 GiB at once" in done.output


@pytest.fixture
def old_driver(tmp_path, monkeypatch):
    """An nvidia-smi that sees two GPUs."""
    (tmp_path / "bin").mkdir()
    smi, gpus = tmp_path / "bin" / "nvidia-smi", "GPU 0: NVIDIA RTX 4090\nGPU 1: NVIDIA RTX 4090"
    smi.write_text(f"#!/bin/sh\n[ $1 = --list-gpus ] && echo '{gpus}' || printf '470.57.02\n470.57.02\n'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use this machine's GPU")
def test_a_gpu_that_torch_cannot_use(old_driver, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(UserError, match=r"^.*\Z") as caught:  # one line
        why_cpu(use_cpu=False)
    for said in ("found 2 GPUs", "driver 470.57.02", "13.0", "torch.version.cuda", "--use_cpu", "a CPU build of torch"):
        assert said in str(caught.value)
    assert why_cpu(use_cpu=True) == "--use_cpu"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "found 2 GPUs" in why_cpu(use_cpu=False) and "CPU build" in why_cpu(use_cpu=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert why_cpu(use_cpu=False) == "no GPU found"


def test_ranks_are_for_gpus_that_will_be_used(old_driver, without_torch, monkeypatch):
    for flags in (["--use_cpu"], ["--use_cpu", "True"], ["--use_cpu=true", "--max_steps", "1"]):
        assert usable_gpus(read_flags(True, flags)) == 0
    monkeypatch.syspath_prepend(without_torch)
    monkeypatch.delitem(sys.modules, "torch")  # as in the launcher, which has not imported it
    assert usable_gpus(read_flags(True, [])) == 0, "a CPU build"
    (without_torch / "torch" / "version.py").write_text("cuda = '13.0'")
    assert usable_gpus(read_flags(True, ["--use_cpu", "False"])) == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert usable_gpus(read_flags(False, [])) == 1


def test_a_cpu_computes_in_float32(monkeypatch, capsys):
    for asked in ("bfloat16", "float16", "auto"):
        assert choose_arithmetic(True, asked) == (True, "float32")
        (line,) = capsys.readouterr().err.splitlines()
        assert line == f"--use_cpu: computing on the CPU in float32, not {asked} as asked for"
    assert choose_arithmetic(True, "float32") == (True, "float32")
    monkeypatch.setenv("BF16_ON_CPU", "1")
    assert choose_arithmetic(True, "bfloat16") == (True, "bfloat16")


def test_a_container_has_less_ram_than_its_machine(tmp_path):
    """Version 2 within its own root, version 1 beside a version 2 without memory; the tightest group counts."""
    machine, own, docker = psutil.virtual_memory().total, tmp_path / "cgroup", "5:cpu,cpuacct:/\n4:memory:/docker/x\n"
    for groups, file, content, ram in (
        ("0::/a/b\n", "a/b/memory.stat", "", machine),
        ("0::/a/b\n", "a/b/memory.max", "max\n", machine),
        ("0::/a/b\n", "a/memory.max", "2000000\n", 2_000_000),
        ("0::/\n", "memory.max", "1000000\n", 1_000_000),
        (docker, "memory/memory.stat", "", machine),
        (docker, "memory/memory.limit_in_bytes", "3000000\n", 3_000_000),
    ):
        own.write_text(groups)
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(content)
        assert usable_ram(own, tmp_path) == ram
    assert usable_ram(tmp_path / "none", tmp_path) == machine


@pytest.mark.skipif(os.geteuid() != 0, reason="making a control group needs root")
def test_a_real_container(tmp_path):
    name, root, file = f"animals-{os.getpid()}", Path("/sys/fs/cgroup"), "memory.max"
    if (root / "memory" / "memory.limit_in_bytes").exists():  # version 1
        root, file = root / "memory", "memory.limit_in_bytes"
    group = root / name
    code = "from animals.training.preflight import usable_ram; print(usable_ram())"
    enter = f"echo $$ > {group}/cgroup.procs && exec {sys.executable} -c '{code}'"
    try:
        group.mkdir()
        (group / file).write_text(str(3 * 2**30))
        done = subprocess.run(["sh", "-c", enter], capture_output=True, text=True, cwd=ROOT)
    except OSError as error:
        pytest.skip(f"this machine lets root make no control group with a limit: {error}")
    finally:
        with contextlib.suppress(FileNotFoundError):
            group.rmdir()
    assert done.stdout == f"{3 * 2**30}\n", done.stderr


def test_what_triton_builds_with(monkeypatch, tmp_path):
    assert not [name for name in preflight.missing_for_triton() if "compiler" in name] or not shutil.which("gcc")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "C compiler (gcc or clang)" in preflight.missing_for_triton()
    monkeypatch.setenv("CC", "/nowhere/cc -O1")
    assert "C compiler (/nowhere/cc)" in preflight.missing_for_triton()
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert f"{tmp_path}/Python.h" in preflight.missing_for_triton()


def test_nothing_is_offloaded_from_a_cpu():
    preflight.check_gpus(SimpleNamespace(use_cpu=True, activation_offloading=False))
    with pytest.raises(UserError, match="^--activation_offloading: found it without a GPU"):
        preflight.check_gpus(SimpleNamespace(use_cpu=True, activation_offloading=True))


def test_the_commit_is_this_repositorys(monkeypatch, tmp_path):
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    monkeypatch.chdir(tmp_path)
    assert describe.commit() == (head or None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert describe.commit() is None


def test_a_slim_container(demo, others_pictures, run, tmp_path, monkeypatch):
    """No git on PATH, and a copy of the files that is no repository: training runs, and records no commit."""
    (tmp_path / "bin").mkdir()
    folders = map(Path, reversed(os.environ["PATH"].split(":")))  # of two commands with one name the first counts
    for name, path in {path.name: path for folder in folders for path in folder.glob("*")}.items():
        if not name.startswith("git"):
            (tmp_path / "bin" / name).symlink_to(path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    if run("sh -c 'command -v git'").code == 0:
        pytest.skip("git lies beside this python")
    copy = tmp_path / "copy"
    for folder in ("animals", "scripts"):
        shutil.copytree(ROOT / folder, copy / folder)
    for path in (*ROOT.glob("*.py"), ROOT / "train.sh"):
        shutil.copy(path, copy)
    done = run(
        f"sh {copy}/train.sh --input_dir {others_pictures} --temp_dir {tmp_path}/cache --model_name_or_path "
        f"{demo.model} --output_dir {tmp_path}/sft --logging_dir {tmp_path}/logs --max_steps 1 --save_steps 1 "
        "--eval_strategy no --eval_on_start False --gradient_accumulation_steps 1"
    )
    assert done.code == 0 and "git" not in done.output, done.output[-3000:]
    for folder in (tmp_path / "sft", tmp_path / "sft" / "checkpoint-1"):
        assert json.loads((folder / "run.json").read_text())["commit"] is None
        assert (folder / "model.safetensors").is_file()


def test_a_rank_that_ends_at_once_still_cleans_up():
    code = "import atexit, sys, train; atexit.register(print, 'cleaned up'); train.end_rank(143)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (143, "cleaned up\n"), done.stderr
