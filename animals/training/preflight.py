"""Everything that can be known to go wrong before the weights load, found together and said in one message.

preflight() takes a second and imports no torch: the launcher calls it before anything slow starts. check_run() adds
what needs the parsed training flags.
"""

import json
import math
import os
import shutil

from animals.checkpoint.check import base_of, check_weights, holds_model, read_shards, require_checkpoint
from animals.checkpoint.load import load_processor
from animals.checkpoint.steps import find_checkpoints
from animals.command import UserError
from animals.compat import whole_models
from animals.pictures.prepare import prepare
from animals.training.batches import TEXT_TOKENS, largest_micro_batch, shuffle_seed
from animals.training.describe import count_steps

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


def preflight(config, model_name_or_path, splits, all_checkpoints=False, output_dir=None):
    """The checkpoint is there, and the pictures are fit for use; builds their caches. Returns prepare()'s summary.

    all_checkpoints: a run's folder will do as well; its newest whole checkpoint says how many tokens a picture has.
    """
    path = model_name_or_path
    if all_checkpoints:
        found = find_checkpoints(path)
        path = next((p for p in reversed(found) if holds_model(p)), path)
    findings = Findings()
    findings.attempt(require_checkpoint, path)
    summary = findings.attempt(prepare, config, splits, base_of(path))
    if output_dir is not None:
        findings.attempt(check_output_dir, output_dir)
    findings.report()
    return summary


def check_run(config, args, model_args, make_scorer):
    """Everything for a training run, before the weights load. -> (prepare()'s summary, scorer, make_plan()'s plan).

    make_scorer(processor, config) raises UserError where two labels have the same tokens. Raises one UserError with
    every problem found, a line each.
    """
    path, findings = model_args.model_name_or_path, Findings()
    summary = findings.attempt(prepare, config, ("train", "validation"), base_of(path))
    scorer = findings.attempt(check_checkpoint, path, config, make_scorer)
    findings.attempt(check_output_dir, args.output_dir)
    findings.attempt(check_ranks, args.use_cpu)
    text = scorer.text_tokens if scorer else TEXT_TOKENS
    plan = findings.attempt(make_plan, config, args, model_args, text) if holds_model(path) else None
    if holds_model(path):
        total = sum(math.prod(shape) for shape in read_shards(base_of(path))[0].values())
        findings.attempt(check_disk, args, plan["trained"] if plan else total)
        findings.attempt(check_memory, args, plan, gpu_memory(args.use_cpu))
        if plan and not args.use_cpu:
            from animals.training.memory import check_host

            findings.attempt(check_host, plan, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    findings.report()
    return summary, scorer, plan


def check_checkpoint(path, config, make_scorer):
    """Files, weights, tokenizer, processor and answers of a checkpoint are usable. -> its scorer."""
    require_checkpoint(path)
    if problems := check_weights(base_of(path)):
        raise UserError("\n".join(problems))
    try:
        processor = load_processor(path)
    except UserError:
        raise
    except Exception as error:  # tokenizers raises bare Exceptions
        raise UserError(
            f"{path}: its tokenizer or processor cannot be read ({(str(error).splitlines() or [''])[0]}); expected the "
            "hub repository's files; fetch all that is not weights again"
        ) from None
    return make_scorer(processor, config)


def make_plan(config, args, model_args, text_tokens=TEXT_TOKENS):
    """The memory plan for these flags, or None where it models nothing of the kind (no ZeRO-3)."""
    from animals.training import memory as memory_plan

    file = args.deepspeed_plugin.hf_ds_config.config if args.deepspeed_plugin else {}
    if file.get("zero_optimization", {}).get("stage") != 3:
        return None
    model = memory_plan.load_config(base_of(model_args.model_name_or_path))
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
            method=("qlora" if model_args.load_in_4bit else "lora") if model_args.use_peft else "full",
            lora_r=model_args.lora_r,
            save_total_limit=args.save_total_limit or 1,
            formed=formed,
            text_tokens=text_tokens,
        )


def gpu_memory(use_cpu):
    """GiB of the smallest GPU of this machine, None without one."""
    import torch

    sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
    return None if use_cpu or not sizes else min(sizes) / GIB


def check_memory(args, plan, found):
    """The plan's peak at the largest picture fits into `found` GiB (None: there is no GPU)."""
    if found is None or plan is None:
        return
    peak = plan["peaks"]["largest"]
    if peak > found:
        raise UserError(
            f"found GPUs of {found:.1f} GiB; expected {peak:.1f} GiB for --per_device_train_batch_size "
            f"{args.per_device_train_batch_size} at the largest picture (computed); look at what "
            "fits: python scripts/memory_plan.py"
        )


def check_disk(args, parameters):
    """Room for save_total_limit checkpoints, one being written, one being deleted, and the final model.

    Bytes a parameter: 2 in safetensors (bf16) and, for resuming, 4 of fp32 master and 2.03 of 8-bit states.
    """
    resumable = 0 if args.save_only_model else 6.03
    checkpoint = parameters * (2 + resumable)
    kept = (args.save_total_limit or 0) + 2 if args.save_strategy != "no" else 0
    parent = os.path.abspath(args.output_dir)
    already = 0
    if os.path.isdir(parent):
        already = sum(os.path.getsize(os.path.join(d, f)) for d, _, files in os.walk(parent) for f in files)
    while not os.path.isdir(parent):
        parent = os.path.dirname(parent)
    needed, free = kept * checkpoint + parameters * 2, shutil.disk_usage(parent).free + already
    if free < needed:
        raise UserError(
            f"--output_dir {args.output_dir}: found {free / GIB:.1f} GiB free; expected {needed / GIB:.1f} GiB for "
            f"{kept} checkpoints of {checkpoint / GIB:.1f} GiB (--save_total_limit {args.save_total_limit} + 2) and "
            f"the model of {parameters * 2 / GIB:.1f} GiB; lower --save_total_limit, or choose another disk"
        )


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


def check_ranks(use_cpu):
    """No more ranks on this machine than GPUs."""
    import torch

    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    gpus = 0 if use_cpu else torch.cuda.device_count()
    if gpus and ranks > gpus:
        raise UserError(f"found {gpus} GPUs for {ranks} processes; expected one each; set NUM_PROCESSES={gpus} or less")


# What a resumed run must share with the one that wrote the checkpoint, and why.
MUST_MATCH = {
    "world_size": "DeepSpeed's optimizer state is cut into one part a rank",
    "effective_batch": "the position in the epoch would be another",
    "training.per_device_train_batch_size": "the order of the pictures would be another",
    "training.train_sampling_strategy": "the order of the pictures would be another",
    "training.seed": "the order of the pictures would be another",
    "training.data_seed": "the order of the pictures would be another",
    "model.dtype": "the weights would be rounded otherwise",
    "labels": "the answers would be others",
    "question": "the prompt would be another",
    "data": "the training pictures changed",
}


def check_resume(record, checkpoint):
    """The checkpoint's run.json agrees with this run's `record` in MUST_MATCH."""
    with open(os.path.join(checkpoint, "run.json"), encoding="utf-8") as file:
        before = json.load(file)

    def look_up(settings, key):
        for part in key.split("."):
            settings = settings.get(part, {})
        return settings

    changed = [
        f"{key.split('.')[-1]} was {look_up(before, key)!r}, is {look_up(record, key)!r} ({why})"
        for key, why in MUST_MATCH.items()
        if look_up(before, key) != look_up(record, key)
    ]
    if changed:
        raise UserError(
            f"{checkpoint} cannot be resumed with these settings: {'; '.join(changed)}; restore them, or start anew "
            "with another --output_dir"
        )
