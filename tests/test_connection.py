"""Before the weights load: the ranks' first collective (its speed, or an end where it hangs), and room in /dev/shm."""

import contextlib
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from animals.command import UserError
from animals.training import preflight
from tests.conftest import ROOT

SCRIPT = """
import sys, time
sys.path.insert(0, {root!r})
import torch
from animals.ranks import check_connection
torch.distributed.init_process_group("gloo")
if torch.distributed.get_rank() == {sleeper}:
    torch.distributed.all_reduce = lambda data: time.sleep(600)
check_connection("cpu", {seconds})
torch.distributed.destroy_process_group()
"""


VALIDATION = """
import sys
sys.path.insert(0, {root!r})
import torch, validation

def look(device):
    print(torch.distributed.group.WORLD._get_backend(device).options._timeout.total_seconds(), "seconds")
    torch.distributed.destroy_process_group()
    sys.exit()

validation.check_connection = look  # called as soon as the ranks are connected
validation.main()
"""


def start(tmp_path, text, *flags, **values):
    script = tmp_path / "ranks.py"
    script.write_text(text.format(root=str(ROOT), **values))
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script), *flags]
    return subprocess.run(words, capture_output=True, text=True, timeout=120)


def test_the_speed_is_said(tmp_path):
    done = start(tmp_path, SCRIPT, sleeper=None, seconds=60)
    assert done.returncode == 0 and "64 MB summed over 2 ranks in" in done.stderr


def test_a_rank_that_does_not_answer_ends_all(tmp_path):
    started = time.monotonic()
    done = start(tmp_path, SCRIPT, sleeper=1, seconds=3)
    assert done.returncode and time.monotonic() - started < 60
    assert done.stderr.count("error: found no answer from the other ranks within 3 s") == 1
    assert "NCCL_P2P_DISABLE=1" in done.stderr and "/dev/shm" in done.stderr and "NCCL_DEBUG=INFO" in done.stderr


def test_a_slow_rank_of_a_validation_is_waited_for(demo, tmp_path):
    """12 hours: NCCL's own 10 minutes, or gloo's 30, would lose the result of all ranks at the last gather."""
    where = ["--input_dir", demo.input, "--temp_dir", demo.cache, "--model_name_or_path", demo.checkpoint]
    done = start(tmp_path, VALIDATION, *map(str, where), "--report_dir", str(tmp_path), "--logging_dir", str(tmp_path))
    assert done.stdout.count(f"{12 * 3600}.0") == 2, done.stdout + done.stderr[-3000:]


def test_docker_gives_too_little_shared_memory(monkeypatch):
    """Four ranks with two workers and batches of four pictures: 64 MB of it are refused, 8 GB are enough."""
    args = SimpleNamespace(
        use_cpu=False, per_device_train_batch_size=4, dataloader_num_workers=2, dataloader_prefetch_factor=None
    )
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for free, fits in ((2**26, False), (2**33, True)):
        monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        refused = pytest.raises(UserError, match=r"found 0.06 GiB free; expected 0.78 GiB .* --shm-size=8g")
        with contextlib.nullcontext() if fits else refused:
            preflight.check_shared_memory(args)
