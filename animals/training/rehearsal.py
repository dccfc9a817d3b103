"""`sh train.sh --rehearse`: minutes of the run, with its weights and pictures on its machine, before the hours.

Evaluates a few pictures, takes one step on the heaviest micro-batch that the run will form (memory, warm-up), then the
run's own first steps, at least three and about a minute; writes a checkpoint to <output_dir>.rehearsal, reads it again
on all ranks and deletes it. Says which of these it is at. Prints what was measured beside what was planned, and leaves
<logging_dir>/<run name>/rehearsal.json, nothing else:
  seconds_a_step (the median) · waiting_for_data (share of the steps' time) · hours (of the whole run, evaluations and
  checkpoints included) · gpus [{name, planned_gib, allocated_gib, reserved_gib}, a rank each] · host_gib and
  planned_host_gib {start, training, resume} · checkpoint {gb, seconds_to_write, seconds_to_read} or null · versions
planned_* are null where there is no plan (8-bit weights), host_gib's resume where nothing is read back.
"""

import contextlib
import copy
import ctypes
import os
import socket
import statistics
import threading
import time
from itertools import chain, islice

import psutil
import torch
from accelerate.utils import gather_object

from animals.checkpoint.steps import rehearsal_folder, sweep
from animals.command import UserError
from animals.compat import load_as_resumed
from animals.files import write_json
from animals.ranks import barrier, main_process, say
from animals.scoring.scorer import stratified_sample
from animals.training.batches import heaviest_micro_batch, shuffle_seed
from animals.training.describe import count_events, count_steps
from animals.training.memory import RANK_RAM, RESERVE, usable_ram
from animals.training.preflight import Findings, check_disk
from animals.training.trainer import AnimalTrainer

GIB = 2**30
STEPS, SECONDS = 3, 60  # timed steps at least, and until so much time has passed, unless the run is shorter


class HostRam(threading.Thread):
    """Peaks of this machine's RAM in GiB, a phase each, while it runs on rank 0. All ranks construct it.

    CPU ranks: what their resident sets grew by, together, since the imports. With GPUs: what the machine uses more than
    at the start, for pinned memory is in no rank's resident set for certain, and the ranks' resident sets of then.
    """

    def __init__(self, use_cpu):
        super().__init__(daemon=True)
        here = socket.gethostname()
        self.ranks = [psutil.Process(pid) for host, pid in gather_object([(here, os.getpid())]) if host == here]
        self.use_cpu, self.peaks, self.phase, self.ended = use_cpu, {}, "start", threading.Event()
        self.base = self.used() - (0 if use_cpu else self.resident())
        self.swapped = psutil.swap_memory().used
        if main_process():
            self.start()

    def resident(self):
        return sum(rank.memory_info().rss for rank in self.ranks)

    def used(self):
        machine = psutil.virtual_memory()
        return self.resident() if self.use_cpu else machine.total - machine.available

    def run(self):
        with contextlib.suppress(psutil.NoSuchProcess):  # a rank died; the launcher says so
            while not self.ended.wait(0.05):
                self.sample()

    def sample(self):
        phase = self.phase
        self.peaks[phase] = max(self.peaks.get(phase, 0), (self.used() - self.base) / GIB)

    def enter(self, phase):
        """The peak of `phase` counts from now; of none: the end."""
        self.sample()
        self.phase = phase
        if phase is None:
            self.ended.set()


def begin(args) -> HostRam:
    """Before the weights load, all ranks: the meter, started. UserError where <output_dir>.rehearsal is somebody's."""
    folder = rehearsal_folder(args.output_dir)
    if os.path.exists(folder):  # main() has swept what a rehearsal left
        raise UserError(
            f"{folder}: found {', '.join(sorted(os.listdir(folder))[:3])} in it; expected no such folder, for the "
            "rehearsal writes its checkpoint there; move it, or choose another --output_dir"
        )
    return HostRam(args.use_cpu)


class RehearsalTrainer(AnimalTrainer):
    """AnimalTrainer that evaluates, takes the heaviest step, times the next ones, writes one checkpoint and stops."""

    def __init__(self, *, args, train_dataset, ram, plan, **kwargs):
        self.run_args, self.pictures = copy.copy(args), len(train_dataset)  # of the run
        self.an_epoch, self.steps = count_steps(args, self.pictures)
        self.evaluations, self.saves = count_events(args, self.pictures)
        self.ram, self.plan = ram, plan
        self.timed, self.passed = [], 0  # timed: (seconds, of these waiting for data) of each step
        args.output_dir, args.max_steps = rehearsal_folder(args.output_dir), self.steps + 1
        args.report_to, args.push_to_hub, args.load_best_model_at_end, args.eval_on_start = [], False, False, True
        super().__init__(args=args, train_dataset=train_dataset, **kwargs)

    def log(self, *args, **kwargs):
        """Nothing: accuracy on a few pictures and losses of other steps than the run's are no news."""

    def heaviest(self) -> list[int]:
        """The pictures of the micro-batch with the most tokens of the whole run. Leaves self.heavy, its words."""
        args, tokens = self.args, list(self.train_dataset[self.args.length_column_name])
        micro_batch = args.per_device_train_batch_size
        if args.train_sampling_strategy == "batch_rebalance":
            sizes = micro_batch, args.gradient_accumulation_steps, args.world_size
            epochs, text = -(-self.steps // self.an_epoch), self.scorer.text_tokens
            chosen, _ = heaviest_micro_batch(tokens, *sizes, shuffle_seed(args), epochs, text)
        else:  # any pictures may meet, the largest too
            chosen = sorted(range(len(tokens)), key=tokens.__getitem__)[-micro_batch:]
        self.heavy = f"{len(chosen)} pictures, the longest of {max(tokens[i] for i in chosen)} image tokens"
        return chosen

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The library's, and how long it waited; at first the heaviest micro-batch, on all ranks, each time."""
        self.started = time.perf_counter()
        if self.state.global_step == 0:
            say(f"rehearsal: a step on the heaviest micro-batch of the run: {self.heavy}")
            self.ahead = list(islice(epoch_iterator, 1))  # data workers start now, not in a timed step
            batch = self.data_collator([self.train_dataset[i] for i in self.chosen])
            found = [dict(batch) for _ in range(num_batches)]  # training_step() takes from it
        else:
            found = list(islice(chain(self.ahead, epoch_iterator), num_batches))
            self.ahead = []
        self.waited = time.perf_counter() - self.started
        return super().get_batch_samples(iter(found), num_batches, device)

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        """Where the library logs, evaluates and saves: what a rehearsal does between its steps. All ranks."""
        if self.state.global_step == self.passed:  # the end of an epoch
            return
        self.passed = self.state.global_step
        if not self.args.use_cpu:
            torch.accelerator.synchronize()
        if self.passed == 1:
            say("rehearsal: the run's own first steps")
            self.first = time.perf_counter()
            return
        self.timed.append((time.perf_counter() - self.started, self.waited))
        long = len(self.timed) >= STEPS and time.perf_counter() - self.first >= SECONDS
        if gather_object([long])[0]:  # rank 0's word
            self.control.should_training_stop = True
        if self.control.should_training_stop:
            self.gpus, self.checkpoint = self.measure_gpus(), None
            if self.args.save_strategy != "no":
                say(f"rehearsal: a checkpoint is written to {self.args.output_dir}")
                started = time.perf_counter()
                self.control.should_evaluate, self.control.should_save = False, True
                super()._maybe_log_save_evaluate(*args, **kwargs)
                self.measure_checkpoint(time.perf_counter() - started)

    def _evaluate(self, *args, **kwargs):
        """Before step 1: two batches a rank of the run's evaluation, the longest and a middling one.

        Leaves seconds_an_evaluation.
        """
        self.ram.enter("training")
        data = self.eval_dataset.select(stratified_sample(self.eval_dataset["label"], self.eval_pictures))
        tokens = list(data["image_tokens"])
        order = sorted(range(len(data)), key=lambda i: -tokens[i])
        each = self.args.per_device_eval_batch_size * self.args.world_size
        middle = max(each, (len(order) - each) // 2)
        chosen = order[:each] + order[middle : middle + each]
        self.eval_pictures = 0  # all of what it is given
        say(f"rehearsal: evaluation of {len(chosen)} pictures")
        seconds = self.evaluate(data.select(chosen))["eval_runtime"]
        self.seconds_an_evaluation = seconds * sum(tokens) / sum(tokens[i] for i in chosen)

    def measure_gpus(self):
        """[{name, allocated_gib, reserved_gib} of each rank's GPU], before anything is read back; [] on CPU ranks."""
        if self.args.use_cpu:
            return []
        mine = {"name": torch.cuda.get_device_name()}
        mine |= {"allocated_gib": torch.cuda.max_memory_allocated() / GIB}
        return gather_object([mine | {"reserved_gib": torch.cuda.max_memory_reserved() / GIB}])

    def measure_checkpoint(self, seconds):
        """Leaves self.checkpoint and self.weights_gb, and no page of it cached: a resumed run finds none."""
        self.folder = os.path.join(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        files = [os.path.join(parent, name) for parent, _, names in os.walk(self.folder) for name in names]
        sizes = {file: os.path.getsize(file) / 1e9 for file in files}
        self.weights_gb = sum(size for file, size in sizes.items() if file.endswith(".safetensors"))
        self.checkpoint = {"gb": sum(sizes.values()), "seconds_to_write": seconds, "seconds_to_read": None}
        for file in files:
            with open(file, "rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def read_back(self):
        """Loads the checkpoint as a resumed run does. All ranks; after train()."""
        if self.checkpoint is None or self.args.save_only_model:
            return
        with contextlib.suppress(AttributeError):  # another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)  # hand back what training took: a resumed run has not trained yet
        if not self.args.use_cpu:
            torch.accelerator.empty_host_cache()
        self.ram.enter("resume")
        say("rehearsal: the checkpoint is read again")
        barrier()
        started = time.perf_counter()
        load_as_resumed(self, self.folder)
        barrier()
        self.checkpoint["seconds_to_read"] = time.perf_counter() - started

    def rehearse(self, logging_dir, versions):
        """All of it, and what it found. All ranks; raises UserError with what would not fit and what to change."""
        self.chosen = self.heaviest()
        try:
            self.train()
            self.read_back()
        except torch.OutOfMemoryError as error:
            raise UserError(self.out_of_memory(error)) from None
        finally:
            self.ram.enter(None)
            if main_process():
                sweep(self.run_args.output_dir)
        each = gather_object([self.timed])  # [ranks][steps]
        waited = max(sum(wait for _, wait in timed) / sum(seconds for seconds, _ in timed) for timed in each)
        if not main_process():
            return
        median = statistics.median(max(seconds for seconds, _ in step) for step in zip(*each, strict=True))
        peak = self.plan and self.plan["peaks"]["largest"]
        found = {
            "seconds_a_step": median,
            "waiting_for_data": waited,
            "hours": self.hours(median),
            "gpus": [{"name": gpu["name"], "planned_gib": peak, **gpu} for gpu in self.gpus],
            "host_gib": {phase: self.ram.peaks.get(phase) for phase in ("start", "training", "resume")},
            "planned_host_gib": planned_host(self.plan, self.args.use_cpu),
            "checkpoint": self.checkpoint,
            "versions": versions,
        }
        os.makedirs(logging_dir, exist_ok=True)
        file = os.path.join(logging_dir, "rehearsal.json")
        write_json(file, found)
        self.show(found)
        print(f"{file} holds these figures. Next: the run itself, the same command without --rehearse", flush=True)
        self.would_not_fit().report()

    def hours(self, seconds_a_step):
        """Of the whole run: its steps, evaluations, checkpoints, and the model at the end."""
        seconds = self.steps * seconds_a_step + self.evaluations * self.seconds_an_evaluation
        if self.checkpoint:
            seconds += self.checkpoint["seconds_to_write"] * (self.saves + self.weights_gb / self.checkpoint["gb"])
        return seconds / 3600

    def show(self, found):
        """Measured beside planned; main process."""
        planned, disk = found["planned_host_gib"], found["checkpoint"]
        rows = [("seconds a step", found["seconds_a_step"], None)]
        rows += [("waiting for data, %", 100 * found["waiting_for_data"], None), ("hours", found["hours"], None)]
        for rank, gpu in enumerate(found["gpus"]):
            rows.append((f"GPU {rank}, allocated GiB", gpu["allocated_gib"], gpu["planned_gib"]))
            rows.append((f"GPU {rank}, reserved GiB", gpu["reserved_gib"], None))
        rows += [(f"host RAM, {phase}, GiB", gib, planned[phase]) for phase, gib in found["host_gib"].items()]
        if disk:
            rows.append(("checkpoint, GB", disk["gb"], self.plan and self.plan["disk_gb"]["checkpoint"]))
            rows.append(("  seconds to write", disk["seconds_to_write"], None))
            rows.append(("  seconds to read", disk["seconds_to_read"], None))
        cell = lambda value: f"{'-' if value is None else format(value, '.3g'):>10}"  # noqa: E731
        print(f"{'':28}  measured   planned")
        for name, measured, plan in rows:
            print(f"{name:28}{cell(measured)}{cell(plan)}")
        saved = f"{self.saves} checkpoints" if disk else "without the time for checkpoints"
        print(f"median of {len(self.timed)} steps; {self.steps} steps, {self.evaluations} evaluations, {saved} in all")

    def out_of_memory(self, error):
        at = "before" if self.ram.phase == "start" else "after" if self.passed else "with"
        planned = f", planned {self.plan['peaks']['largest']:.1f} GiB" if self.plan else ""
        return (
            f"found too little memory on the GPU ({str(error).splitlines()[0]}); expected the run's heaviest "
            f"micro-batch to fit ({self.heavy}{planned}; ended {at} it); halve --per_device_train_batch_size and "
            "double --gradient_accumulation_steps, or see what fits: python scripts/memory_plan.py"
        )

    def would_not_fit(self) -> Findings:
        """RAM that had to be swapped, and a disk too small for all checkpoints of the run, as large as this one."""
        problems, swapped = Findings(), (psutil.swap_memory().used - self.ram.swapped) / GIB
        if swapped > 1:
            problems.append(
                f"host RAM: found {swapped:.1f} GiB swapped out during the rehearsal; expected the peaks above to fit "
                f"{usable_ram() / GIB:.0f} GiB; end other programs, add RAM, or use --use_peft"
            )
        if self.checkpoint:
            sizes = self.checkpoint["gb"] * 1e9, self.weights_gb * 1e9
            problems.attempt(check_disk, self.run_args, self.pictures, *sizes, "measured")
        return problems


def planned_host(plan, use_cpu):
    """{start, training, resume: GiB}, as HostRam measures them.

    The plan counts GPU ranks whole. On CPU ranks what a GPU would hold lies in RAM as well, and imports do not count.
    """
    phases = ("start", "training", "resume")
    if plan is None:
        return dict.fromkeys(phases)
    planned = {phase: plan["host_gib"][phase] for phase in phases}
    if use_cpu:
        stands = plan["resident"] - plan["items"]["8-bit states"]
        device = {"start": stands, "training": plan["peaks"]["largest"] - RESERVE, "resume": plan["resident"]}
        planned = {phase: planned[phase] + plan["num_gpus"] * (device[phase] - RANK_RAM) for phase in phases}
    return planned
