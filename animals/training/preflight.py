"""What can be known to be wrong with a training run, checked before the weights load and reported in one message.

The launcher makes the first two checks before it starts a rank, so that most mistakes are reported within a second.
Every rank makes all of them, because ranks on a second machine read their own disk.
"""

import contextlib
import glob
import math
import os
import shutil
import sysconfig
from pathlib import Path

from animals.checkpoint.check import base_of, check_weights, holds_model, read_shards
from animals.checkpoint.load import load_processor, zero3_is_on
from animals.checkpoint.steps import rehearsal_folder, run_lock
from animals.command import Findings, UserError
from animals.files import nearest_existing, require_writable
from animals.pictures.prepare import check_inputs
from animals.training.describe import batch_sizes, count_events, count_pictures
from animals.training.parts import belongs, check_parts, read_parts

# Flags of SFTConfig and ModelConfig that this trainer does not follow, and why. Only their defaults are accepted.
REFUSED = {
    "max_length packing packing_strategy eval_packing padding_free pad_to_multiple_of truncation_mode": "each picture "
    "is a sequence of its own, and a cut one would lose its picture or its answer",
    "dataset_text_field dataset_kwargs shuffle_dataset remove_unused_columns length_column_name label_names": "the "
    "columns are those that data_process_utils.py writes; --train_sampling_strategy sets the order",
    "dataset_num_proc": "--data_processes sets the number of processes that check the pictures",
    "chat_template_path eos_token pad_token": "the chat format is the checkpoint's own (task.json)",
    "completion_only_loss": "--assistant_only_loss says what is learned: the answer, or with False every token",
    "model_init_kwargs model_revision trust_remote_code": "--model_name_or_path is a folder, and no code in it is run",
    "router_aux_loss_coef": "the model is no mixture of experts",
    "use_liger_kernel liger_kernel_config": "TRL's fused loss and SDPA's flash kernels are used, without Liger",
    "fp16 fp16_full_eval bf16_full_eval": "training and evaluation compute in the type of --dtype; --bf16 is on",
    "auto_find_batch_size accelerator_config": "--per_device_train_batch_size and --gradient_accumulation_steps are "
    "kept as they are; `--rehearse` measures whether they fit",
    "logging_nan_inf_filter": "a loss that is not finite ends the run",
    "greater_is_better": "--metric_for_best_model says it: more accuracy or macro_f1 is better, and less loss",
    "prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics "
    "batch_eval_metrics": "evaluation measures accuracy, macro-F1 and loss on --eval_pictures",
    "save_on_each_node enable_jit_checkpoint": "rank 0 saves, and SIGTERM saves a checkpoint too",
    "dataloader_persistent_workers": "data workers always stay from epoch to epoch",
    "fsdp fsdp_config parallelism_config": "DeepSpeed ZeRO-3 or DDP divides the work; --config_file chooses",
    "do_train do_eval do_predict": "train.py trains, and --eval_strategy says when it measures",
    "lora_task_type": "the task is the answer to a question",
    "push_to_hub hub_model_id hub_strategy hub_token hub_private_repo hub_always_push hub_revision": "it would "
    "push half-trained models, the token and this machine's paths; `hf upload` pushes the model (scripts/README.md)",
}
NEEDED = {  # flags that have an effect with another one only
    "use_peft": "lora_r lora_alpha lora_dropout lora_target_modules lora_target_parameters lora_modules_to_save "
    "use_rslora use_dora",
    "load_in_4bit": "bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage",
}
GIB = 2**30
RESUME_BYTES = 6.04  # in a checkpoint per trained parameter, to resume: float32 weights 4, 8-bit Adam 2.03, the rest
RANK_GIB = 3  # host RAM of a rank for Python, CUDA, the libraries and data workers; an assumption


def check_run(config, args, model_args):
    """-> ({split: summary of prepare()}, Scorer), or one UserError with every problem, one per line. All ranks."""
    path, findings, scorer = model_args.model_name_or_path, Findings(), None
    require_writable("--temp_dir", config.temp_dir)  # the caches are built in it
    summaries = findings.attempt(check_inputs, config, path, ("train", "validation"))
    findings.attempt(check_output_dir, args.output_dir)
    findings.attempt(require_writable, "--logging_dir", config.logging_dir)
    findings.attempt(check_gpus, args)
    findings.attempt(check_shared_memory, args)
    findings.attempt(check_parts, config, args, model_args)
    if args.save_only_model and args.load_best_model_at_end and args.deepspeed_plugin:
        findings.append("--save_only_model: found the choice of a best checkpoint, too; expected one; leave one out")
    if holds_model(path):
        scorer = findings.attempt(check_checkpoint, path, config)
        shapes, _ = read_shards(base_of(path))
        if summaries:
            n, batch = count_pictures(config, summaries["train"]), math.prod(batch_sizes(args))
            if args.dataloader_drop_last and n < batch:
                findings.append(f"--dataloader_drop_last: found {n} pictures; expected {batch}, a step; leave it out")
            sizes = saved_bytes(args, model_args, shapes, config.train_parts)
            findings.attempt(check_disk, args, n, *sizes)
        findings.attempt(check_host_ram, args, model_args, shapes)
    findings.report()
    return summaries, scorer


def flag_problems(flags, default) -> list[str]:
    """A line for each flag of the namespace that this trainer would not follow. default(name): its default."""
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK as KNOWN

    given, trackers = {name for name, value in vars(flags).items() if value != default(name)}, {*flags.report_to}
    unread = f" with --report_to {' '.join(flags.report_to)}; expected a tracker that reads it"
    reasons = {names: f"; expected no such flag: {why}" for names, why in REFUSED.items()}
    for other, names in NEEDED.items():
        if not getattr(flags, other):
            reasons[names] = f" without --{other}; expected both, or neither"
    if trackers <= {"tensorboard", "none"}:  # TensorBoard's runs have the name of --output_dir
        reasons["run_name"] = unread
    if not trackers & {"trackio", "all"}:
        reasons["project trackio_space_id trackio_bucket_id trackio_static_space_id"] = unread
    lines = [f"--{name}: found it{why}" for names, why in reasons.items() for name in names.split() if name in given]
    for name in flags.report_to if flags.report_to not in (["none"], ["all"]) else ():
        if name not in KNOWN:
            lines.append(f"--report_to: found {name}; expected {', '.join(sorted(KNOWN))}")
        elif name not in get_available_reporting_integrations():
            how = "found no Python package for it; expected it; install it with pip, or name another one"
            lines.append(f"--report_to {name}: {how}")
    metric, metrics = flags.metric_for_best_model, ("accuracy", "macro_f1", "loss")  # of AnimalTrainer.evaluate()
    if metric is None and flags.save_strategy == "best" or metric and metric.removeprefix("eval_") not in metrics:
        lines.append(f"--metric_for_best_model: found {metric}; expected {', '.join(metrics)}; name one of them")
    measured, saved = (flags.eval_strategy, flags.eval_steps), (flags.save_strategy, flags.save_steps)
    same = measured[0] == saved[0] and (measured[0] != "steps" or measured == saved) or saved[0] == "best"
    if flags.load_best_model_at_end and ("no" in measured or not same):
        found = "--early_stopping_patience and --load_best_model_at_end: found --eval_strategy {} --eval_steps {} and "
        found += "--save_strategy {} --save_steps {}; expected the same strategy (steps, epoch) and steps; set them"
        lines.append(found.format(*measured, *saved))
    if flags.class_weights and (flags.loss_type != "nll" or flags.label_smoothing_factor):
        found = f"--loss_type {flags.loss_type} and --label_smoothing_factor {flags.label_smoothing_factor:g}"
        lines.append(f"--class_weights: found {found}; expected nll and 0, the loss that it weights; leave one out")
    if flags.attn_implementation not in (None, "sdpa"):
        lines.append(
            f"--attn_implementation: found {flags.attn_implementation}; expected sdpa, the default, which has flash "
            "kernels of its own: no other one takes the 4-D mask by which labels are scored; remove the flag"
        )
    return lines


def check_output_dir(output_dir):
    """Raises UserError unless output_dir can be written to and is absent, empty or a run of train.py that has ended."""
    for folder in filter(os.path.isdir, (output_dir, rehearsal_folder(output_dir))):
        with run_lock(folder, shared=True):  # another check does not count
            pass
    content = sorted(os.listdir(output_dir)) if os.path.isdir(output_dir) else []
    if content and not any(name in ("run.json", ".saving") or name.startswith("checkpoint-") for name in content):
        raise UserError(
            f"--output_dir {output_dir}: found {', '.join(content[:3])} in it; expected an empty folder or an earlier "
            "run of train.py; choose another, or empty it"
        )
    if glob.escape(output_dir) != output_dir:
        why = "because DeepSpeed would look for checkpoints by it as a pattern; name another folder"
        raise UserError(f"--output_dir {output_dir}: found *, ? or [ in its path; expected none, {why}")
    require_writable("--output_dir", output_dir)


def check_checkpoint(path, config):
    """-> the Scorer of the checkpoint in `path`. Raises UserError if its weights, tokenizer or answers are unusable."""
    from animals.scoring.scorer import Scorer

    Findings(check_weights(base_of(path))).report()
    return Scorer(load_processor(path), config)


def check_gpus(args):
    """Every rank on this machine needs its own GPU, and Triton a compiler for the kernels of TRL's loss."""
    import torch

    if args.use_cpu:
        if args.activation_offloading:
            raise UserError("--activation_offloading: found it without a GPU; expected one, whose memory it saves")
        return
    ranks, gpus, findings = ranks_here(), torch.cuda.device_count(), Findings()
    if ranks > gpus:
        findings.append(f"found {gpus} GPUs for {ranks} processes; expected one each; set NUM_PROCESSES={gpus} or less")
    if missing := missing_for_triton():
        findings.append(
            f"found no {' and no '.join(missing)}; expected both: Triton compiles the loss on the GPU with them; "
            "apt install gcc python3-dev, or name a compiler in $CC"
        )
    findings.report()


def check_shared_memory(args):
    """Data workers pass their batches on through /dev/shm, and NCCL data between GPUs that cannot reach each other.

    Docker gives it 64 MB. A batch is computed for pictures of five tiles of 336x336 pixels in float32. An assumption:
    NCCL takes 100 MB per rank.
    """
    if args.use_cpu or not os.path.isdir("/dev/shm"):
        return
    batch = args.per_device_train_batch_size * 5 * 3 * 336**2 * 4
    waiting = args.dataloader_num_workers * (args.dataloader_prefetch_factor or 2)
    expected, found = ranks_here() * (waiting * batch + 10**8), shutil.disk_usage("/dev/shm").free
    if found < expected:
        raise UserError(
            f"/dev/shm: found {found / GIB:.2f} GiB free; expected {expected / GIB:.2f} GiB for NCCL and batches of "
            "the data workers; start the container with --shm-size=8g, or train with --dataloader_num_workers 0"
        )


def missing_for_triton() -> list[str]:
    """What triton/runtime/build.py would not find: a C compiler ($CC, gcc or clang), this Python's header files."""
    compilers = [os.environ["CC"].split()[0]] if os.environ.get("CC") else ["gcc", "clang"]
    header = os.path.join(sysconfig.get_path("include"), "Python.h")
    missing = [] if any(map(shutil.which, compilers)) else [f"C compiler ({' or '.join(compilers)})"]
    return missing if os.path.isfile(header) else [*missing, header]


def ranks_here() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def saved_bytes(args, model_args, shapes, train_parts) -> tuple[float, float]:
    """Bytes of (one checkpoint, the final model) for a model with parameters of these {name: shape}.

    Each saved parameter has 2 bytes, in float32 4; each trained one RESUME_BYTES more, unless --save_only_model. With
    LoRA the result is an upper bound: as if every matrix had an adapter. Parts that train beside it are saved with it.
    """
    sizes, parts = {name: math.prod(shape) for name, shape in shapes.items()}, read_parts(train_parts)
    saved = sum(sizes.values())
    trained = sum(n for name, n in sizes.items() if belongs(name, parts) or belongs(f"model.{name}", parts))
    if model_args.use_peft:
        modules = model_args.lora_modules_to_save or ()
        saved = trained + sum(model_args.lora_r * sum(shape) for shape in shapes.values() if len(shape) == 2)
        saved += sum(size for name, size in sizes.items() if any(module in name for module in modules))
        trained = saved
    final = saved * (4 if model_args.dtype == "float32" else 2)
    return final + (0 if args.save_only_model else RESUME_BYTES * trained), final


def disk_needed(args, pictures, checkpoint_bytes, final_bytes) -> tuple[int, float]:
    """(checkpoints at once, bytes) of a complete run when it needs most.

    While a checkpoint is written, all that --save_total_limit keeps are still there; then the oldest one is deleted.
    """
    kept = saves = count_events(args, pictures)[1]
    if (args.save_total_limit or 0) > 0:
        kept = min(saves, max(args.save_total_limit, 1 + args.load_best_model_at_end))  # the best one stays as well
    at_once = min(saves, kept + 1)
    return at_once, max(at_once * checkpoint_bytes, kept * checkpoint_bytes + final_bytes)


def check_disk(args, pictures, checkpoint_bytes, final_bytes, how="computed"):
    """Raises UserError unless the disk of --output_dir has room for the run; files already in it count as free."""
    at_once, needed = disk_needed(args, pictures, checkpoint_bytes, final_bytes)
    already = sum(path.stat().st_size for path in Path(args.output_dir).rglob("*") if path.is_file())
    room = shutil.disk_usage(nearest_existing(args.output_dir)).free + already
    if room < needed:
        raise UserError(
            f"--output_dir {args.output_dir}: found {room / GIB:.1f} GiB free; expected {needed / GIB:.1f} GiB for "
            f"{at_once} checkpoints of {checkpoint_bytes / GIB:.1f} GiB at once ({how}; --save_steps "
            f"{args.save_steps:g}, --save_total_limit {args.save_total_limit}) and the model of "
            f"{final_bytes / GIB:.1f} GiB; lower --save_total_limit, or choose another disk"
        )


def check_host_ram(args, model_args, shapes):
    """Raises UserError unless the ranks on this machine have the RAM to load the weights onto their GPUs.

    Under ZeRO-3 rank 0 reads all weights at once, beside the pinned partitions of all ranks. Otherwise each tensor goes
    to the GPU before the next one is read.
    """
    ranks, found = ranks_here(), usable_ram() / GIB
    weights = sum(map(math.prod, shapes.values())) * (4 if model_args.dtype == "float32" else 2) / GIB
    loading = weights * (1 + ranks / args.world_size) if zero3_is_on(args) else 0
    expected = loading + ranks * RANK_GIB
    if found < expected and not args.use_cpu:
        raise UserError(
            f"found {found:.0f} GiB of RAM; expected {expected:.0f} GiB: {ranks} processes of {RANK_GIB} GiB and "
            f"{loading:.1f} GiB to load weights of {weights:.1f} GiB (computed); add RAM, or train with --use_peft "
            "--config_file scripts/ddp.yaml"
        )


def usable_ram(own="/proc/self/cgroup", cgroups="/sys/fs/cgroup") -> int:
    """Bytes of RAM that this process may use: the machine's, or less in a container, of whose limit psutil is unaware.

    The limits of all control groups above this process count. In a container its own may be the root that it sees.
    """
    import psutil

    limits = [psutil.virtual_memory().total]
    with contextlib.suppress(OSError):  # no control groups: not Linux
        for line in Path(own).read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            root, name = ("memory", "memory.limit_in_bytes") if controllers else ("", "memory.max")  # version 1, 2
            inside = Path(group.strip("/"))
            for folder in (inside, *inside.parents):
                with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                    limits.append(int(Path(cgroups, root, folder, name).read_text()))
    return min(limits)
