"""Start a script of ours on every GPU: `accelerate launch` or `torchrun`, with early answers and honest exit codes.

    python scripts/launch.py [flags of accelerate launch] train.py [flags of train.py]
    python scripts/launch.py validation.py [flags of validation.py]

As many processes as GPUs are visible, or one; NUM_PROCESSES=n overrides (without a GPU: n CPU ranks). What the user
must mend is said within a second or two, before torch is imported anywhere; the exit code is the script's own, not
the launcher's 1. train.py may just as well be started with plain `accelerate launch`.
"""

import argparse
import gc
import logging
import os
import runpy
import signal
import socket
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import config as settings
from animals.checkpoint.task import settings_for
from animals.command import UserError, run

try:
    from animals.training.preflight import preflight
except ModuleNotFoundError as error:  # before `pip install`: say what can be said without any package
    MISSING = error.name

    def preflight(config, model, splits, *_):
        problems = [f"found no Python package {MISSING}; expected requirements.txt; pip install -r requirements.txt"]
        wanted = {os.path.join(model, "config.json"): "a checkpoint"}
        wanted |= {os.path.join(config.input_dir, f"{split}_data"): "pictures, a folder a class" for split in splits}
        problems += [
            f"{path}: not found; expected {what}; see README.md"
            for path, what in wanted.items()
            if not os.path.exists(path)
        ]
        raise UserError("\n".join(problems))


def count_gpus():
    """The GPUs this process may use. Asks nvidia-smi: importing torch for it takes seconds."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([gpu for gpu in visible.split(",") if gpu.strip() not in ("", "-1")])
    try:
        return subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True).stdout.count("GPU ")
    except OSError:
        return 0


def count_processes():
    """NUM_PROCESSES, else one a GPU, else 1."""
    chosen = os.environ.get("NUM_PROCESSES")
    if chosen is not None:
        gpus = count_gpus()
        if not chosen.isdigit() or int(chosen) < 1 or 0 < gpus < int(chosen):
            most = f" to {gpus}, the GPUs there are" if gpus else ""
            raise UserError(f"NUM_PROCESSES: found {chosen!r}; expected a whole number from 1{most}")
        return int(chosen)
    return max(1, count_gpus())


def run_here(args):
    """torchrun's work for a lone rank: the script in this process, which has imported much of what it needs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    one = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "1") | dict.fromkeys(("RANK", "LOCAL_RANK"), "0")
    os.environ.update(one, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.argv = [args.training_script, *args.training_script_args]
    runpy.run_path(args.training_script, run_name="__main__")


def main():
    words = sys.argv[1:]
    at = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    if at is None:
        raise UserError("launch.py: found no script; expected train.py or validation.py")
    launcher_flags, script, flags = words[:at], words[at], words[at + 1 :]
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # of train.sh's own flags, the launcher's one
    own.add_argument("--config_file")
    chosen, flags = own.parse_known_args(flags)
    if chosen.config_file:
        if not os.path.isfile(chosen.config_file):
            raise UserError(
                f"--config_file {chosen.config_file}: not found; expected scripts/deepspeed_zero3.yaml, "
                "scripts/ddp.yaml or another one of accelerate's"
            )
        launcher_flags.append(f"--config_file={chosen.config_file}")
    processes = count_processes()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # less fragmentation near 24 GB
    if not count_gpus():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns when it has to find out
    training = os.path.basename(script) == "train.py"
    if not {"-h", "--help"} & set(flags):
        parser = settings.parser("")
        model = settings.TRAINING_DEFAULTS["model_name_or_path" if training else "output_dir"]
        parser.add_argument("--model_name_or_path", default=model)
        parser.add_argument("--all_checkpoints", action="store_true")
        parser.add_argument("--linear_probe", action="store_true")
        parser.add_argument("--rivals", default="")
        parser.add_argument("--output_dir", default=settings.TRAINING_DEFAULTS["output_dir"] if training else None)
        args, _ = parser.parse_known_args(flags)
        probe = args.linear_probe or "probe" in args.rivals
        splits = ("train", "validation") if training or probe else ("validation",)
        config = settings_for(settings.take(args), args.model_name_or_path, training)
        preflight(config, args.model_name_or_path, splits, args.all_checkpoints, args.output_dir)
    if not training and processes == 1:
        os.execv(sys.executable, [sys.executable, script, *flags])

    gc.disable()  # importing makes millions of objects and no garbage; load_weights() enables it
    import torch.distributed.run as torchrun

    def launch_training():
        from accelerate.commands.launch import launch_command, launch_command_parser

        port = ["--main_process_port=0"]  # any free one
        words = [*port, *launcher_flags, f"--num_processes={processes}", script, *flags]
        launch_command(launch_command_parser().parse_args(words))

    if processes == 1 and "--num_machines" not in " ".join(launcher_flags):
        torchrun.run = run_here
        launch_training()
        return

    os.environ["LAUNCHER_PID"] = str(os.getpid())  # by which the ranks know whom to end with
    import psutil
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # torchrun answers a signal by killing the ranks after 30 s, less than a checkpoint of the 7B takes. Ours pass it
    # on, and the ranks end when they have saved.
    torchrun_parser = torchrun.get_args_parser

    def parser_without_signals():
        result = torchrun_parser()
        result.set_defaults(signals_to_handle="SIGQUIT")
        return result

    def pass_on(number, frame):
        ranks = psutil.Process().children()
        for rank in ranks:
            rank.send_signal(number)
        if not ranks:
            sys.exit(128 + number)

    torchrun.get_args_parser = parser_without_signals
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, pass_on)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # its page says less than our line
    try:
        if training:
            launch_training()
        else:
            torchrun.main(["--standalone", f"--nproc_per_node={processes}", script, *flags])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        if code not in (2, 130, 143):
            how = (
                f"was killed by signal {-failure.exitcode}" if failure.exitcode < 0 else f"ended with exit code {code}"
            )
            again = "; `sh train.sh` again goes on from the last complete checkpoint" if training else ""
            print(f"error: rank {rank} {how}; what it said stands above{again}", file=sys.stderr)
        sys.exit(code)


if __name__ == "__main__":
    run(main)
