"""Which rank speaks and which wait, on a GPU or the CPU, in which type: one answer for all. Imports torch late."""

import functools
import os
import subprocess
import sys
import time

from animals.command import UserError


def main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def barrier():
    """All ranks."""
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def say(message):
    """On rank 0's stderr."""
    if main_process():
        print(message, file=sys.stderr, flush=True)


def ask_nvidia_smi(*flags) -> str:
    """What nvidia-smi prints; nothing where there is none, or no driver. Importing torch for it takes seconds."""
    try:
        done = subprocess.run(["nvidia-smi", *flags], capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout if done.returncode == 0 else ""


def count_gpus() -> int:
    """The GPUs that this process may use, whether torch can or not."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([gpu for gpu in visible.split(",") if gpu.strip() not in ("", "-1")])
    return ask_nvidia_smi("--list-gpus").count("GPU ")


def why_cpu(use_cpu: bool) -> str | None:
    """Why this process computes on the CPU; None: on a GPU. Raises UserError for a GPU that torch cannot use."""
    import torch

    if use_cpu:
        return "--use_cpu"
    if torch.cuda.is_available():
        return None
    gpus = count_gpus()
    if not gpus:
        return "no GPU found"
    driver = ask_nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0].strip()
    found = f"found {gpus} GPUs (nvidia-smi; driver {driver or 'unknown'})"
    if torch.version.cuda is None:
        return f"{found} and a CPU build of torch (torch.version.cuda is None)"
    raise UserError(
        f"{found} that torch cannot use; expected a driver for its CUDA, {torch.version.cuda} (torch.version.cuda); "
        "update the driver (see README.md), or compute on the CPU: --use_cpu, or a CPU build of torch"
    )


def seconds_a_product(dtype) -> float:
    """CPU seconds of one thread for a product of 256 x 256 matrices: the same on a busy machine."""
    import torch

    threads, taken, square = torch.get_num_threads(), [], torch.ones(256, 256, dtype=dtype)
    torch.set_num_threads(1)
    for _ in range(4):  # the first one is slow everywhere
        started = time.thread_time()
        square @ square
        taken.append(time.thread_time() - started)
    torch.set_num_threads(threads)
    return min(taken)


def cpu_bf16_speed() -> float:
    """How many times as fast this CPU multiplies bf16 matrices as float32 ones; 0.01 without instructions for them.

    Measured once, in a tenth of a second: by the launcher, which passes it on in $CPU_BF16_SPEED, else by rank 0.
    """
    return float(os.environ.get("CPU_BF16_SPEED") or measure_bf16_speed())


@functools.cache
def measure_bf16_speed() -> float:
    import torch

    speed = [seconds_a_product(torch.float32) / seconds_a_product(torch.bfloat16)]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # one answer for all, or they wait for each other for ever
        from accelerate import PartialState
        from accelerate.utils import broadcast_object_list

        PartialState(cpu=True)
        broadcast_object_list(speed)
    return speed[0]


def choose_arithmetic(use_cpu: bool, dtype: str) -> tuple[bool, str]:
    """(whether on the CPU, the type to compute in where `dtype` was asked for), said in a line. All ranks.

    On a CPU bfloat16 becomes float32 unless it is as fast. Raises UserError for a GPU that torch cannot use.
    """
    reason = why_cpu(use_cpu)
    if reason is None:
        return False, dtype
    if dtype != "bfloat16" or cpu_bf16_speed() >= 1:
        say(f"{reason}: on the CPU in {dtype}")
        return True, dtype
    say(
        f"{reason}: on the CPU in float32, not bfloat16 as asked for, in which it multiplies matrices at "
        f"{cpu_bf16_speed():.2g} of the speed"
    )
    return True, "float32"
