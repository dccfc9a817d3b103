"""Start a script of ours on every GPU: `accelerate launch` or `torchrun`, with early answers and honest exit codes.

    python scripts/launch.py [flags of accelerate launch] train.py [flags of train.py]
    python scripts/launch.py validation.py [flags of validation.py]

As many processes as GPUs are visible, or one; NUM_PROCESSES=n overrides (without a GPU: n CPU ranks). What the user
must mend is said within a second or two, before torch is imported anywhere; the exit code is the script's own, not
the launcher's 1. train.py may just as well be started with plain `accelerate launch`.
"""

import argparse
import importlib.util
import json
import logging
import os
import runpy
import signal
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import config as settings
from animals.checkpoint.task import settings_for
from animals.command import UserError, run
from animals.ranks import count_gpus, cpu_bf16_speed
from animals.training.preflight import check_setup


def read_words(words):
    """-> (flags for accelerate launch, the script, its flags). train.sh's --config_file is the launcher's."""
    at = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    if at is None:
        raise UserError("launch.py: found no script; expected train.py or validation.py")
    launcher_flags, script, flags = words[:at], words[at], words[at + 1 :]
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--config_file")
    chosen, flags = own.parse_known_args(flags)
    if chosen.config_file:
        if not os.path.isfile(chosen.config_file):
            raise UserError(
                f"--config_file {chosen.config_file}: not found; expected scripts/deepspeed_zero3.yaml, "
                "scripts/ddp.yaml or another one of accelerate's"
            )
        launcher_flags.append(f"--config_file={chosen.config_file}")
    return launcher_flags, script, flags


def usable_gpus(flags):
    """The GPUs to start ranks on: none with --use_cpu, nor where torch is a CPU build (the script says which)."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--use_cpu", nargs="?", const="true", default="false")
    if parser.parse_known_args(flags)[0].use_cpu.lower() in ("true", "t", "yes", "y", "1"):
        return 0
    torch = importlib.util.find_spec("torch")
    if torch and "CUDA_VISIBLE_DEVICES" not in os.environ:
        version = runpy.run_path(os.path.join(os.path.dirname(torch.origin), "version.py"))  # importing takes seconds
        if version["cuda"] is None:
            return 0
    return count_gpus()


def count_processes(gpus):
    """NUM_PROCESSES, else one a GPU, else 1."""
    chosen = os.environ.get("NUM_PROCESSES", str(max(1, gpus)))
    if not chosen.isdigit() or int(chosen) < 1 or 0 < gpus < int(chosen):
        most = f" to {gpus}, the GPUs there are" if gpus else ""
        raise UserError(f"NUM_PROCESSES: found {chosen!r}; expected a whole number from 1{most}")
    return int(chosen)


def check(training, flags):
    """What can be known without torch; the ranks get the answer in $PREFLIGHT."""
    parser = settings.parser("")
    model = settings.TRAINING_DEFAULTS["model_name_or_path" if training else "output_dir"]
    parser.add_argument("--model_name_or_path", default=model)
    parser.add_argument("--all_checkpoints", action="store_true")
    parser.add_argument("--linear_probe", action="store_true")
    parser.add_argument("--output_dir", default=settings.TRAINING_DEFAULTS["output_dir"] if training else None)
    args, _ = parser.parse_known_args(flags)
    splits = ("train", "validation") if training or args.linear_probe else ("validation",)
    config = settings_for(settings.take(args), args.model_name_or_path, training)
    found = check_setup(config, args.model_name_or_path, splits, args.all_checkpoints, args.output_dir)
    os.environ["PREFLIGHT"] = json.dumps(found)


def pass_signals_on():
    """SIGTERM, SIGHUP and Ctrl-C go to the ranks, which end when they have saved.

    torchrun would kill them after 30 s, less than a checkpoint of the 7B takes: it is told to leave these alone.
    """
    import psutil

    def pass_on(number, frame):
        ranks = psutil.Process().children()
        for rank in ranks:
            rank.send_signal(number)
        if not ranks:
            sys.exit(128 + number)

    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # torchrun's --signals-to-handle
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, pass_on)


def start_ranks(training, launcher_flags, processes, script, flags):
    """Runs until all ranks have ended. -> (the rank that failed first or None, its exit code; negative: its signal)"""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        if training:
            from accelerate.commands.launch import launch_command, launch_command_parser

            port = ["--main_process_port=0"]  # any free one
            words = [*port, *launcher_flags, f"--num_processes={processes}", script, *flags]
            launch_command(launch_command_parser().parse_args(words))
        else:
            import torch.distributed.run

            torch.distributed.run.main(["--standalone", f"--nproc_per_node={processes}", script, *flags])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return rank, failure.exitcode
    except subprocess.CalledProcessError as error:  # of a lone rank without DeepSpeed
        return 0, error.returncode
    return None, 0


def main():
    launcher_flags, script, flags = read_words(sys.argv[1:])
    training = os.path.basename(script) == "train.py"
    asks_for_help = {"-h", "--help"} & set(flags)
    gpus = usable_gpus(flags)
    processes = count_processes(gpus)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # less fragmentation near 24 GB
    if not gpus:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns when it has to find out
    if not asks_for_help:
        check(training, flags)
    if asks_for_help or not training and processes == 1:
        os.execv(sys.executable, [sys.executable, script, *flags])

    pass_signals_on()
    if not gpus:
        os.environ["CPU_BF16_SPEED"] = str(cpu_bf16_speed())  # once, for all ranks
    os.environ["LAUNCHER_PID"] = str(os.getpid())  # by which the ranks know whom to end with
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # its page says less than our line
    rank, code = start_ranks(training, launcher_flags, processes, script, flags)
    if code not in (0, 2, 130, 143):
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        again = "; `sh train.sh` again goes on from the last complete checkpoint" if training else ""
        print(f"error: rank {rank} {how}; what it said stands above{again}", file=sys.stderr)
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    run(main)
