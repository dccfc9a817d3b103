"""Which rank is the main process, and on which device and in which type all ranks compute. Imports torch late."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

from animals.command import UserError

STOPPING = signal.SIGTERM, signal.SIGINT, signal.SIGHUP  # the signals that end a run


def main_process() -> bool:
    """Whether this is rank 0: the one that prints and writes files."""
    return int(os.environ.get("RANK", "0")) == 0


def barrier():
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def check_connection(device, seconds=60):
    """Sum 64 MB over all ranks and say how fast that is. All ranks call it, before the weights load.

    If it takes longer than `seconds`, the process ends with one line and exit code 2: where the GPUs cannot reach each
    other, NCCL would wait in silence for 10 or 30 minutes. The time begins when all ranks have met over gloo.
    """
    import torch
    from torch import distributed

    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return
    distributed.barrier(distributed.new_group(backend="gloo"))
    timer = threading.Timer(seconds, end_without_connection, [seconds])  # a call inside NCCL may never return
    timer.daemon = True
    timer.start()
    data, ranks = torch.ones(2**24, device=device), distributed.get_world_size()
    for _ in range(2):  # the first one makes the connections
        started = time.perf_counter()
        distributed.all_reduce(data)
        data[0].item()  # waits for the GPU
        taken = time.perf_counter() - started
    timer.cancel()
    speed = 2 * (ranks - 1) / ranks * data.nbytes / taken / 1e9  # "bus bandwidth" of NVIDIA/nccl-tests, PERFORMANCE.md
    say(f"connection      64 MB summed over {ranks} ranks in {taken:.3f} s: {speed:.1f} GB/s per rank")


def end_without_connection(seconds):
    if not main_process():
        time.sleep(3)  # let the main process print first
    say(
        f"error: found no answer from the other ranks within {seconds} s; expected the sum of 64 MB; try "
        "NCCL_P2P_DISABLE=1, make /dev/shm larger (docker run --shm-size=8g), and see what NCCL_DEBUG=INFO prints"
    )
    os._exit(2)


def end_with_parent():
    """From now on the system kills this process when the thread that started it ends, however that ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # Linux: PR_SET_PDEATHSIG


def say(message):
    if main_process():
        print(message, file=sys.stderr, flush=True)


def ask_nvidia_smi(*flags) -> str:
    """What nvidia-smi prints; nothing without a driver. To import torch for this would take seconds."""
    found = shutil.which("nvidia-smi")
    done = found and subprocess.run([found, *flags], capture_output=True, text=True)
    return done.stdout if done and done.returncode == 0 else ""


def count_gpus() -> int:
    """How many GPUs this process may use, whether torch can use them or not."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return len([gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu.strip() not in ("", "-1")])
    return ask_nvidia_smi("--list-gpus").count("GPU ")


def why_cpu(use_cpu: bool) -> str | None:
    """The reason why this process computes on the CPU, or None on a GPU. UserError: a GPU that torch cannot use."""
    import torch

    if use_cpu:
        return "--use_cpu"
    if torch.cuda.is_available():
        return None
    if not (gpus := count_gpus()):
        return "no GPU found"
    driver = ask_nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0].strip()
    found = f"found {gpus} GPUs (nvidia-smi; driver {driver or 'unknown'})"
    if torch.version.cuda is None:
        return f"{found} and a CPU build of torch (torch.version.cuda is None)"
    raise UserError(
        f"{found} that torch cannot use; expected a driver for its CUDA, {torch.version.cuda} (torch.version.cuda); "
        "update the driver (see README.md), or compute on the CPU: --use_cpu, or a CPU build of torch"
    )


def choose_arithmetic(use_cpu: bool, dtype: str) -> tuple[bool, str]:
    """-> (whether to compute on the CPU, the type to compute in if `dtype` was asked for). UserError: see why_cpu().

    A CPU computes in float32, unless BF16_ON_CPU=1: with it, tests and benchmarks run the code of a GPU.
    """
    reason = why_cpu(use_cpu)
    if reason is None:
        return False, dtype
    chosen = dtype if os.environ.get("BF16_ON_CPU") == "1" else "float32"
    say(f"{reason}: computing on the CPU in {chosen}" + (f", not {dtype} as asked for" if chosen != dtype else ""))
    return True, chosen
