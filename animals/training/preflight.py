"""Everything that can be known to go wrong before the weights load, found together and said in one message.

check_setup() imports no torch and takes a second: the launcher calls it before anything slow starts, and tells the
ranks in $PREFLIGHT; ranks that were started without it check for themselves. check_run() adds what a training run needs
torch or its flags for.
"""

import json
import math
import os
import shutil
import sysconfig

from animals.checkpoint.check import base_of, check_weights, holds_model, read_shards, require_checkpoint
from animals.checkpoint.load import load_processor
from animals.checkpoint.steps import find_checkpoints
from animals.command import UserError
from animals.compat import whole_models
from animals.training.batches import TEXT_TOKENS, largest_micro_batch, shuffle_seed
from animals.training.describe import count_events, count_steps
from animals.training.parts import PARTS, check_parts, read_parts

GIB = 2**30


class Findings(list):
    """The problems that several checks found, to be said together."""

    def attempt(self, check, *values):
        """check(*values); a UserError is noted and gives None."""
        try:
            return check(*values)
        except UserError as error:
            self.append(str(error))

    def report(self):
        """Raise one UserError with all of them, if there are any."""
        if self:
            raise UserError("\n".join(self))


# --- without torch ----------------------------------------------------------------------------------------------------


def check_setup(config, model_name_or_path, splits, all_checkpoints=False, output_dir=None):
    """The checkpoint is there, the pictures are fit for use, their caches built. -> {split: {"n", "fingerprint"}}.

    all_checkpoints: a run's folder will do as well; its newest whole checkpoint says how many tokens a picture has.
    """
    if "PREFLIGHT" in os.environ:
        return json.loads(os.environ["PREFLIGHT"])
    path, findings = model_name_or_path, Findings()
    if all_checkpoints:
        found = find_checkpoints(path)
        path = next((p for p in reversed(found) if holds_model(p)), path)
    findings.attempt(require_checkpoint, path)
    summary = findings.attempt(check_pictures, config, splits, path)
    if output_dir is not None:
        findings.attempt(check_output_dir, output_dir)
    findings.report()
    return {split: {key: summary[split][key] for key in ("n", "fingerprint")} for split in splits}


def check_pictures(config, splits, path):
    """prepare()'s summary; before `pip install`, what can be said without any package."""
    try:
        from animals.pictures.prepare import prepare
    except ModuleNotFoundError as error:
        lines = [f"found no Python package {error.name}; expected requirements.txt; pip install -r requirements.txt"]
        folders = [os.path.join(config.input_dir, f"{split}_data") for split in splits]
        lines += [
            f"{folder}: not found; expected pictures, a folder a class; see README.md"
            for folder in folders
            if not os.path.isdir(folder)
        ]
        raise UserError("\n".join(lines)) from None
    return prepare(config, splits, base_of(path))


def check_output_dir(output_dir):
    """Empty, absent, or a run of ours; and writable."""
    if os.path.isdir(output_dir):
        content = sorted(os.listdir(output_dir))
        ours = "run.json" in content or ".saving" in content or any(n.startswith("checkpoint-") for n in content)
        if content and not ours:
            raise UserError(
                f"--output_dir {output_dir}: found {', '.join(content[:3])} in it; expected an empty folder or an "
                "earlier run of train.py; choose another, or empty it"
            )
        parent = output_dir
    else:
        parent = os.path.dirname(os.path.abspath(output_dir))
        while not os.path.exists(parent):
            parent = os.path.dirname(parent)
    if not os.path.isdir(parent) or not os.access(parent, os.W_OK):
        raise UserError(f"--output_dir {output_dir}: {parent} cannot be written to; choose another folder")


# --- with torch, for training -----------------------------------------------------------------------------------------


def check_run(config, args, model_args):
    """Everything for a training run, before the weights load. -> (check_setup()'s summary, scorer, memory plan).

    Raises one UserError with every problem found, a line each.
    """
    path, findings, scorer, plan = model_args.model_name_or_path, Findings(), None, None
    summary = findings.attempt(check_setup, config, path, ("train", "validation"), False, args.output_dir)
    findings.attempt(check_attention, model_args)
    findings.attempt(check_gpus, args)
    findings.attempt(check_parts, config, args, model_args)
    if holds_model(path):
        scorer = findings.attempt(check_checkpoint, path, config)
    if holds_model(path) and summary:
        plan = findings.attempt(make_plan, config, args, model_args, scorer.text_tokens if scorer else TEXT_TOKENS)
        shapes, _ = read_shards(base_of(path))
        trained = plan["trained"] if plan and not model_args.use_peft else None
        findings.attempt(check_disk, args, summary["train"]["n"], *saved_bytes(args, model_args, shapes, trained))
        findings.attempt(check_memory, args, plan, free_memory(args.use_cpu))
        if plan and not args.use_cpu:
            from animals.training.memory import check_host

            findings.attempt(check_host, plan, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    findings.report()
    return summary, scorer, plan


def check_checkpoint(path, config):
    """Weights, tokenizer, processor and answers of a checkpoint are usable. -> its scorer."""
    from animals.scoring.scorer import Scorer

    if problems := check_weights(base_of(path), config.image_view):
        raise UserError("\n".join(problems))
    try:
        processor = load_processor(path, config.image_view)
    except UserError:
        raise
    except Exception as error:  # tokenizers raises bare Exceptions
        raise UserError(
            f"{path}: its tokenizer or processor cannot be read ({(str(error).splitlines() or [''])[0]}); expected the "
            "hub repository's files; fetch all that is not weights again"
        ) from None
    return Scorer(processor, config)


def check_attention(model_args):
    """Evaluation scores all labels in one pass, by a 4-D mask that only SDPA reads: eager attention adds it up."""
    if model_args.attn_implementation not in (None, "sdpa"):
        raise UserError(
            f"--attn_implementation: found {model_args.attn_implementation}; expected sdpa, the default, which has "
            "flash kernels of its own: no other takes the mask by which labels are scored; leave the flag out"
        )


def check_gpus(args):
    """No more ranks on this machine than GPUs, and what Triton needs to build a launcher for TRL's loss kernels."""
    import torch

    if args.use_cpu:
        return
    ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    problems = []
    if ranks > gpus:
        problems.append(f"found {gpus} GPUs for {ranks} processes; expected one each; set NUM_PROCESSES={gpus} or less")
    if lacking := missing_for_triton():
        problems.append(
            f"found no {' and no '.join(lacking)}; expected both, for the loss on the GPU (Triton builds a launcher at "
            "its first step); apt install gcc python3-dev, or name a compiler in $CC"
        )
    if problems:
        raise UserError("\n".join(problems))


def missing_for_triton() -> list[str]:
    """As triton/runtime/build.py looks: a C compiler, $CC or gcc or clang, and this Python's header files."""
    compilers = [os.environ["CC"].split()[0]] if os.environ.get("CC") else ["gcc", "clang"]
    header = os.path.join(sysconfig.get_path("include"), "Python.h")
    lacking = [] if any(map(shutil.which, compilers)) else [f"C compiler ({' or '.join(compilers)})"]
    return lacking if os.path.isfile(header) else [*lacking, header]


def make_plan(config, args, model_args, text_tokens=TEXT_TOKENS):
    """The memory plan for these flags, or None where it models nothing of the kind (8-bit weights)."""
    from animals.training import memory as memory_plan

    if model_args.load_in_8bit:
        return None
    file = args.deepspeed_plugin.hf_ds_config.config if args.deepspeed_plugin else {}
    zero3 = file.get("zero_optimization", {}).get("stage") == 3
    file = file if zero3 else {"zero_optimization": {}}
    model = memory_plan.load_config(base_of(model_args.model_name_or_path), config.image_view)
    tokens, formed = memory_plan.token_counts(model, config.temp_dir), None
    if args.train_sampling_strategy == "batch_rebalance":
        sizes = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size
        counts = memory_plan.all_counts(model, config.temp_dir)
        an_epoch, steps = count_steps(args, len(counts))
        formed = largest_micro_batch(counts, *sizes, shuffle_seed(args), math.ceil(steps / an_epoch), text_tokens)
    with whole_models():
        return memory_plan.plan(
            model,
            file,
            args.world_size,
            args.per_device_train_batch_size,
            args.gradient_accumulation_steps,
            (tokens["median"], tokens["largest"]),
            offload_activations=bool((args.activation_checkpointing_kwargs or {}).get("offload")),
            method=memory_plan.method_of(zero3, model_args.use_peft, model_args.load_in_4bit),
            lora_r=model_args.lora_r,
            save_total_limit=args.save_total_limit or 1,
            formed=formed,
            text_tokens=text_tokens,
            parts=list(PARTS) if model_args.use_peft else read_parts(config.train_parts),
        )


def free_memory(use_cpu):
    """Free GiB on this rank's GPU, None without one. Its own CUDA context, about 0.4, is already taken from it."""
    import torch

    return None if use_cpu else torch.cuda.mem_get_info()[0] / GIB


def check_memory(args, plan, free):
    """The plan's peak at the largest picture fits into `free` GiB (None: there is no GPU)."""
    if free is None or plan is None:
        return
    peak = plan["peaks"]["largest"]
    if peak > free:
        raise UserError(
            f"found {free:.1f} GiB free on the GPU; expected {peak:.1f} GiB for --per_device_train_batch_size "
            f"{args.per_device_train_batch_size} at the largest picture (computed); look at what "
            "fits: python scripts/memory_plan.py; and at who else computes there: nvidia-smi"
        )


def saved_bytes(args, model_args, shapes, trained=None) -> tuple[float, float]:
    """Bytes of (a checkpoint, the final model) with weights of {name: shape}; LoRA: at most, adapters to all of them.

    2 or 4 a parameter in safetensors and, for resuming, CHECKPOINT_BYTES of each trained one.
    """
    from animals.training.memory import CHECKPOINT_BYTES

    parameters = sum(math.prod(shape) for shape in shapes.values())
    if model_args.use_peft:
        whole = tuple(model_args.lora_modules_to_save or ())
        parameters = sum(model_args.lora_r * sum(shape) for shape in shapes.values() if len(shape) == 2)
        parameters += sum(math.prod(shape) for name, shape in shapes.items() if any(part in name for part in whole))
    final = parameters * (4 if model_args.dtype == "float32" else 2)
    return final + (0 if args.save_only_model else CHECKPOINT_BYTES * (trained or parameters)), final


def disk_needed(args, pictures, checkpoint, final) -> tuple[int, float]:
    """(checkpoints at once, bytes) of a whole run at its fullest.

    One checkpoint is written while those that --save_total_limit keeps still stand; the final model, after the oldest
    has gone.
    """
    kept = saves = count_events(args, pictures)[1]
    if (args.save_total_limit or 0) > 0:
        kept = min(saves, max(args.save_total_limit, 1 + args.load_best_model_at_end))  # the best one stays as well
    at_once = min(saves, kept + 1)
    return at_once, max(at_once * checkpoint, kept * checkpoint + final)


def check_disk(args, pictures, checkpoint, final, how="computed"):
    """Room in --output_dir for what the run will save; what lies there already is its own and counts as room."""
    at_once, needed = disk_needed(args, pictures, checkpoint, final)
    parent = os.path.abspath(args.output_dir)
    already = 0
    if os.path.isdir(parent):
        already = sum(os.path.getsize(os.path.join(d, f)) for d, _, files in os.walk(parent) for f in files)
    while not os.path.isdir(parent):
        parent = os.path.dirname(parent)
    room = shutil.disk_usage(parent).free + already
    if room < needed:
        raise UserError(
            f"--output_dir {args.output_dir}: found {room / GIB:.1f} GiB free; expected {needed / GIB:.1f} GiB for "
            f"{at_once} checkpoints of {checkpoint / GIB:.1f} GiB at once ({how}; --save_steps {args.save_steps:g}, "
            f"--save_total_limit {args.save_total_limit}) and the model of {final / GIB:.1f} GiB; lower "
            "--save_total_limit, or choose another disk"
        )
