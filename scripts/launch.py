"""Start train.py or validation.py on every GPU, through `accelerate launch` or `torchrun`.

    python scripts/launch.py train.py [--config_file FILE] [flags of train.py]
    python scripts/launch.py validation.py [flags of validation.py]

One process per visible GPU, or one; NUM_PROCESSES=n overrides (without a GPU: n processes on the CPU). What the user
must correct is reported within a second or two, before torch is imported. The exit code is the script's own.
"""

import contextlib
import importlib.util
import logging
import math
import os
import runpy
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import config as settings
from animals.checkpoint.steps import delete_old_rehearsal, newest_complete, states_file
from animals.checkpoint.task import settings_for
from animals.command import RANGES, Findings, Parser, UserError, run
from animals.files import looked_up, require_writable
from animals.pictures.prepare import check_inputs
from animals.ranks import STOPPING, count_gpus
from animals.training.preflight import check_output_dir


def split_words(words):
    """-> (the script, --config_file of accelerate, the script's flags)."""
    parser = Parser(add_help=False)
    parser.add_argument("script", choices=["train.py", "validation.py"])
    parser.add_argument("--config_file", default="scripts/deepspeed_zero3.yaml")
    chosen, flags = parser.parse_known_args(words)
    if not os.path.isfile(chosen.config_file):
        known = "scripts/deepspeed_zero3.yaml, scripts/ddp.yaml or another one of accelerate's"
        raise UserError(f"--config_file {looked_up(chosen.config_file)}: not found; expected {known}")
    return chosen.script, chosen.config_file, flags


def read_flags(training, flags):
    """Those flags of the script that the launcher reads, as a namespace; the script itself refuses unknown ones."""
    parser = settings.parser("", (*settings.DATA_FIELDS, "logging_dir"))
    model = "model_name_or_path" if training else "output_dir"
    parser.add_argument("--model_name_or_path", default=settings.TRAINING_DEFAULTS[model])
    parser.add_argument("--output_dir", default=settings.TRAINING_DEFAULTS["output_dir"])
    parser.add_argument("--rehearse", nargs="?", const="run", choices=["run", "all"])
    parser.add_argument("--use_cpu", nargs="?", const="true", default="false", type=str.lower)
    parser.add_argument("--dry_run", action="store_true")
    for name, (lowest, _) in RANGES.items():  # checked before a rank starts
        if name not in settings.DATA_FIELDS:
            parser.add_argument(f"--{name}", type=type(lowest))
    return parser.parse_known_args(flags)[0]


def usable_gpus(args):
    """How many GPUs to start ranks on: none with --use_cpu, and none if torch is a CPU build."""
    if args.use_cpu in ("true", "t", "yes", "y", "1"):  # what transformers' parser takes for True
        return 0
    torch, chosen = importlib.util.find_spec("torch"), "CUDA_VISIBLE_DEVICES" in os.environ  # importing takes seconds
    if torch and not chosen and runpy.run_path(Path(torch.origin).with_name("version.py"))["cuda"] is None:
        return 0
    return count_gpus()


def count_processes(gpus):
    """NUM_PROCESSES, else one per GPU, else one."""
    chosen = os.environ.get("NUM_PROCESSES", str(max(1, gpus)))
    if not chosen.isdigit() or int(chosen) < 1 or 0 < gpus < int(chosen):
        most = f" to {gpus}, the GPUs there are" if gpus else ""
        raise UserError(f"NUM_PROCESSES: found {chosen!r}; expected a whole number from 1{most}")
    return int(chosen)


def pass_signals_on():
    """SIGTERM, SIGHUP and Ctrl-C go to the ranks, which save and end by themselves."""
    import psutil

    def pass_on(number, frame):
        ranks = psutil.Process().children()
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                rank.send_signal(number)
        if not ranks:
            sys.exit(128 + number)

    # torchrun's --signals-to-handle: it would kill the ranks after 30 s, less than a checkpoint of the 7B takes.
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    for number in STOPPING:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, pass_on)


def start_ranks(args, training, config_file, processes, script, flags, deepspeed):
    """Start the ranks and wait for them. If one fails, end with its exit code, or 128 + the signal that killed it."""
    import torch.distributed.run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        if training:
            from accelerate.commands.launch import launch_command, launch_command_parser

            # port 0: any free one
            words = [f"--config_file={config_file}", f"--num_processes={processes}", "--main_process_port=0", script]
            launch_command(launch_command_parser().parse_args([*words, *flags]))
        else:
            torch.distributed.run.main(["--standalone", f"--nproc_per_node={processes}", script, *flags])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode  # of a killed one: -signal
        if args.rehearse:
            with contextlib.suppress(UserError):  # another rehearsal's
                delete_old_rehearsal(args.output_dir)
        if -code in STOPPING:  # while training, a rank ends by itself
            print(f"{signal.Signals(-code).name}: the run has ended; there was nothing to save", file=sys.stderr)
        elif code not in (2, 129, 130, 143):  # codes of ranks that ended by themselves
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            saves = training and not (args.dry_run or args.rehearse)
            newest = saves and newest_complete(args.output_dir, states_file(deepspeed), math.inf)[0]
            again = f"; `sh train.sh` with the same flags continues from {newest}" if newest else ""
            print(f"error: rank {rank} {how}; its own messages stand above{again}", file=sys.stderr)
        sys.exit(code if code >= 0 else 128 - code)


def main():
    script, config_file, flags = split_words(sys.argv[1:])
    training, alone = script == "train.py", [sys.executable, script, *flags]
    if {"-h", "--help"} & set(flags):
        os.execv(sys.executable, alone)
    args = read_flags(training, flags)
    gpus = usable_gpus(args)
    processes = count_processes(gpus)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    # Less fragmentation near 24 GB; pinned host memory above 1 MB as large as asked, not the next power of two.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True,pinned_max_round_threshold_mb:1")
    if not gpus:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns when it has to find out
    config, findings = settings_for(settings.config_from(args), args.model_name_or_path, training), Findings()
    splits = ("train", "validation") if training else ("validation",)
    require_writable("--temp_dir", config.temp_dir)  # the caches are built in it
    summaries = findings.attempt(check_inputs, config, args.model_name_or_path, splits)
    if training:
        findings.attempt(check_output_dir, args.output_dir)
    findings.attempt(require_writable, "--logging_dir", config.logging_dir)
    findings.report()
    if args.rehearse == "all":
        from animals.training.recipes import rehearse_all

        rehearse_all(args, config_file, flags, processes, gpus, summaries["train"]["image_tokens"]["mean"])
    import yaml  # only now: the checks must run before anything is installed

    deepspeed = yaml.safe_load(Path(config_file).read_text("utf-8")).get("distributed_type") == "DEEPSPEED"
    if processes == 1 and not (training and deepspeed):
        if gpus > 1:  # transformers would use them all, by DataParallel
            os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        os.execv(sys.executable, alone)  # this process becomes the rank, so that a signal reaches it
    pass_signals_on()
    # Its long message about a failed rank says less than our line.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    start_ranks(args, training, config_file, processes, script, flags, deepspeed)


if __name__ == "__main__":
    run(main)
