"""`sh train.sh --rehearse`: a few minutes of the real run, with its weights and pictures, before the long run.

Evaluates a few pictures, takes an ordinary step (the optimizer makes its states in it), then one on the heaviest
micro-batch that the run will form (memory), then further steps of the run, at least three and about a minute; writes a
checkpoint to <output_dir>.rehearsal, reads it again on all ranks and deletes it. Prints what was measured, and leaves
<logging_dir>/<run name>/rehearsal.json, nothing else:
  seconds_per_step (the median) · waiting_for_data (share of the steps' time, main process) · hours (of the complete run
  with its evaluations and checkpoints) · gpus [{name, allocated_gib, reserved_gib, retries}, one per rank] · host_gib
  {start (until the first step), training, resume}, null for a phase that did not happen · checkpoint {gb,
  seconds_to_write, seconds_to_read} or null · versions
"""

import contextlib
import copy
import ctypes
import json
import os
import shutil
import socket
import statistics
import threading
import time
from itertools import islice, pairwise
from pathlib import Path

import psutil
import torch
from accelerate.utils import gather_object

from animals.checkpoint.steps import rehearsal_folder
from animals.command import UserError
from animals.compat import load_as_resumed
from animals.files import write_json
from animals.ranks import barrier, main_process, say
from animals.training.batches import heaviest_micro_batch, shuffle_seed
from animals.training.describe import batch_sizes, count_events, count_steps
from animals.training.parts import TRAINED
from animals.training.preflight import GIB, check_disk
from animals.training.trainer import AnimalTrainer

STEPS, SECONDS = 3, 60  # at least so many timed steps, for at least so long, or the complete run if it is shorter


class HostRam(threading.Thread):
    """Measures `peaks`, {phase: GiB of this machine's RAM}, on the main process. All ranks start it before they load.

    On CPU ranks: by how much the ranks' resident memory together has grown since the imports. With GPUs: the ranks'
    resident memory at the start and what the machine uses more since, because pinned memory may count for no rank.
    """

    def __init__(self, use_cpu):
        super().__init__(daemon=True)
        here = socket.gethostname()
        self.ranks = [psutil.Process(pid) for host, pid in gather_object([(here, os.getpid())]) if host == here]
        self.use_cpu, self.peaks = use_cpu, {}
        self.base = self.used() - (0 if use_cpu else self.resident())
        self.phase = "start"  # start, training or resume; None ends the measurement
        if main_process():
            self.start()

    def resident(self):
        return sum(rank.memory_info().rss for rank in self.ranks)

    def used(self):
        return self.resident() if self.use_cpu else psutil.virtual_memory().total - psutil.virtual_memory().available

    def run(self):
        with contextlib.suppress(psutil.NoSuchProcess):  # a rank died, which the launcher reports
            while phase := self.phase:
                self.peaks[phase] = max(self.peaks.get(phase, 0), (self.used() - self.base) / GIB)
                time.sleep(0.05)


class RehearsalTrainer(AnimalTrainer):
    """AnimalTrainer that evaluates a few pictures, takes a step and the heaviest one, then times ordinary steps."""

    def __init__(self, *, args, train_dataset, eval_dataset, ram, **kwargs):
        self.run_args, self.pictures, self.ram = args, len(train_dataset), ram
        self.fetches = []  # of each step: when it began, and when it had its batches
        count = 2 * args.per_device_eval_batch_size * args.world_size  # two batches per rank
        tokens = list(eval_dataset["image_tokens"])
        longest = eval_dataset.select(sorted(range(len(tokens)), key=tokens.__getitem__)[-count:])
        self.evaluated_share = sum(longest["image_tokens"]) / sum(tokens)
        args = copy.copy(args)
        args.output_dir = rehearsal_folder(args.output_dir)
        args.max_steps = 2 + count_steps(args, self.pictures)[1]
        args.report_to, args.load_best_model_at_end, args.eval_on_start = [], False, True
        args.logging_strategy = args.eval_strategy = args.save_strategy = "no"  # rehearse() says when
        super().__init__(args=args, train_dataset=train_dataset, eval_dataset=longest, **kwargs)

    def log(self, logs, *args, **kwargs):
        """Print nothing: losses and accuracy of a rehearsal say nothing about the run."""
        self.state.log_history.append({**logs, "step": self.state.global_step})

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Times the library's method; the second step has the heaviest micro-batch on every rank and accumulation."""
        if not self.args.use_cpu:
            torch.accelerator.synchronize()  # until the step before this one has ended
        started = time.perf_counter()
        batches = list(islice(epoch_iterator, num_batches))
        self.fetches.append((started, time.perf_counter()))
        if len(self.fetches) == 1:
            self.ram.phase = "training"
            say("rehearsal: a first step, in which the optimizer makes its states")
        elif len(self.fetches) == 2:
            chosen, text = self.heaviest()
            say(f"rehearsal: a step on the heaviest micro-batch of the run: {text}")
            heavy = self.data_collator([self.train_dataset[i] for i in chosen])
            batches = [dict(heavy) for _ in batches]  # training_step() takes `pictures` out of each
        elif len(self.fetches) == 3:
            say("rehearsal: the run's own steps")
        enough = len(self.fetches) > STEPS + 1 and started - self.fetches[2][0] >= SECONDS
        if gather_object([enough])[0]:  # the main process decides for all ranks
            self.state.max_steps = self.state.global_step + 1  # this step is the last one
        return super().get_batch_samples(iter(batches), num_batches, device)

    def heaviest(self) -> tuple[list[int], str]:
        """The micro-batch with the most tokens of the complete run: indices of its pictures, and its size in words."""
        args, image_tokens = self.run_args, list(self.train_dataset[self.args.length_column_name])
        if args.train_sampling_strategy == "batch_rebalance":
            per_epoch, steps = count_steps(args, self.pictures)
            run = shuffle_seed(args), -(-steps // per_epoch), self.scorer.text_tokens
            chosen = heaviest_micro_batch(image_tokens, *batch_sizes(args), *run)
        else:  # any pictures may come together, also the longest
            chosen = sorted(range(len(image_tokens)), key=image_tokens.__getitem__)[-args.per_device_train_batch_size :]
        longest = max(image_tokens[i] for i in chosen)
        return chosen, f"{len(chosen)} pictures, the longest of {longest} image tokens"

    def try_checkpoint(self) -> tuple[dict, float]:
        """Write a checkpoint and read it as a resumed run does: ({gb, seconds to write, to read}, GB of weights)."""
        say(f"rehearsal: a checkpoint is written to {self.args.output_dir}")
        started = time.perf_counter()
        self.save_checkpoint()
        seconds = {"seconds_to_write": time.perf_counter() - started, "seconds_to_read": None}
        folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        gb = {path: path.stat().st_size / 1e9 for path in folder.rglob("*") if path.is_file()}
        for path in gb:
            with open(path, "rb") as file:  # a resumed run does not find it cached in RAM
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        ctypes.CDLL(None).malloc_trim(0)  # free what training used: a resumed run has not trained yet
        if not self.args.use_cpu:
            torch.accelerator.empty_host_cache()
        if not self.args.save_only_model:
            self.ram.phase = "resume"
            say("rehearsal: the checkpoint is read again")
            barrier()
            started = time.perf_counter()
            load_as_resumed(self, str(folder))
            barrier()
            seconds["seconds_to_read"] = time.perf_counter() - started
        weights = [gb[path] for path in gb if path.suffix == ".safetensors" and path.name != TRAINED]
        return {"gb": sum(gb.values()), **seconds}, sum(weights)

    def rehearse(self, logging_dir):
        """All of it: print the figures and write rehearsal.json. All ranks; UserError with what would not fit."""
        args, checkpoint, weights_gb = self.run_args, None, None
        say(f"rehearsal: evaluation of {len(self.eval_dataset)} pictures")
        try:
            self.train()
            ended, gpus = time.perf_counter(), [] if args.use_cpu else measure_gpus()
            if args.save_strategy != "no":
                checkpoint, weights_gb = self.try_checkpoint()
        except torch.OutOfMemoryError as error:
            when = ("before", "during", "after")[min(self.state.global_step, 2)]
            raise UserError(out_of_memory(error, self.heaviest()[1], when)) from None
        finally:
            self.ram.phase = None
            if main_process():
                shutil.rmtree(self.args.output_dir, ignore_errors=True)
        if not main_process():
            return
        timed = [(end - began, ready - began) for (began, ready), (end, _) in pairwise([*self.fetches[2:], (ended, 0)])]
        seconds, waited = zip(*timed, strict=True)
        step, evaluation = statistics.median(seconds), self.state.log_history[0]["eval_runtime"] / self.evaluated_share
        steps, events = count_steps(args, self.pictures)[1], count_events(args, self.pictures)
        found = {
            "seconds_per_step": step,
            "waiting_for_data": sum(waited) / sum(seconds),
            "hours": hours_of_run(steps, *events, step, evaluation, checkpoint, weights_gb),
            "gpus": gpus,
            "host_gib": {phase: self.ram.peaks.get(phase) for phase in ("start", "training", "resume")},
            "checkpoint": checkpoint,
            "versions": self.record["versions"],
        }
        os.makedirs(logging_dir, exist_ok=True)
        file = os.path.join(logging_dir, "rehearsal.json")
        write_json(file, found)
        for name, value in json.loads(json.dumps(found), parse_float=lambda text: float(f"{float(text):.3g}")).items():
            print(f"{name:18}{value}")
        if any(gpu["retries"] for gpu in gpus):
            print("a GPU's memory was full and had to be freed (retries): --wait_in_forward may prevent it")
        print(f"median of {len(timed)} steps; {steps} steps, {events[0]} evaluations, {events[1]} checkpoints in all")
        print(f"{file} holds these figures. Next: the run itself, the same command without --rehearse", flush=True)
        if checkpoint:
            check_disk(args, self.pictures, checkpoint["gb"] * 1e9, weights_gb * 1e9, "measured")


def measure_gpus() -> list[dict]:
    """{name, allocated_gib, reserved_gib (peaks), retries (allocator)} of each GPU. All ranks."""
    peaks = {"allocated_gib": torch.cuda.max_memory_allocated(), "reserved_gib": torch.cuda.max_memory_reserved()}
    found = {"name": torch.cuda.get_device_name(), **{key: peak / GIB for key, peak in peaks.items()}}
    return gather_object([found | {"retries": torch.cuda.memory_stats().get("num_alloc_retries", 0)}])


def hours_of_run(steps, evaluations, saves, seconds_per_step, seconds_per_evaluation, checkpoint, weights_gb):
    """Hours of the complete run: its steps, evaluations, checkpoints, and the final model, which is weights alone."""
    seconds = steps * seconds_per_step + evaluations * seconds_per_evaluation
    if checkpoint:
        seconds += checkpoint["seconds_to_write"] * (saves + weights_gb / checkpoint["gb"])
    return seconds / 3600


def out_of_memory(error, heaviest, when) -> str:
    """The error's text; memory ran out before, during or after the step on the heaviest micro-batch."""
    return (
        f"found too little memory on the GPU ({str(error).splitlines()[0]}); expected the run's heaviest micro-batch "
        f"to fit ({heaviest}; memory ran out {when} this step); halve --per_device_train_batch_size and double "
        "--gradient_accumulation_steps, or see what fits: python scripts/memory_plan.py"
    )
