"""What a training run is about to do: for people on the console, for the record in run.json. Imports no torch."""

import dataclasses
import math
import os
import platform
import statistics
import subprocess
from importlib import metadata

import config as settings


def count_steps(args, pictures) -> tuple[int, int]:
    """(optimizer steps an epoch, in all) as transformers.Trainer counts them."""
    a_step = args.per_device_train_batch_size * args.world_size  # micro-batches of all ranks
    micro_batches = pictures // a_step if args.dataloader_drop_last else math.ceil(pictures / a_step)
    an_epoch = max(1, math.ceil(micro_batches / args.gradient_accumulation_steps))
    return an_epoch, args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * an_epoch)


def count_events(args, pictures) -> tuple[int, int]:
    """(evaluations, checkpoints) of a whole run, by asking the library's own callback about each of its steps."""
    from transformers import TrainerControl
    from transformers.trainer_callback import DefaultFlowCallback, TrainerState

    an_epoch, steps = count_steps(args, pictures)
    flow, state = DefaultFlowCallback(), TrainerState(max_steps=steps)
    state.compute_steps(args, steps)
    evaluations = saves = 0
    for step in range(1, steps + 1):
        state.global_step, state.epoch = step, step / an_epoch
        said = [flow.on_step_end(args, state, TrainerControl())]
        if step % an_epoch == 0 or step == steps:
            said.append(flow.on_epoch_end(args, state, TrainerControl()))
        evaluations += sum(control.should_evaluate for control in said)
        saves += sum(control.should_save for control in said)
    if args.save_strategy == "best":
        saves = evaluations  # at most: where each is better than all before
    return evaluations + args.eval_on_start, saves


def describe(args, model_args, data, collator, summary):
    """What is about to run, as equations, and one example with the learned tokens marked. Main process only."""
    tokens = sorted(data[args.length_column_name])
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps_per_epoch, steps = count_steps(args, len(data))
    device = "CPU ranks" if args.use_cpu else "GPUs"
    zero = args.deepspeed_plugin.zero_stage if args.deepspeed_plugin else None
    example = collator([data[0]])
    ids, labels = example["input_ids"][0].tolist(), example["labels"][0].tolist()
    learned = sum(label != -100 for label in labels)
    print(
        f"pictures        {len(data)} to train on; {summary}\n"
        f"image tokens    {tokens[0]} to {tokens[-1]} a picture, median {statistics.median(tokens):g}; "
        f"learned in the example below: {learned}\n"
        f"effective batch {args.per_device_train_batch_size} per device x {args.gradient_accumulation_steps} "
        f"accumulated x {args.world_size} {device} = {per_step} pictures a step\n"
        f"steps           {steps_per_epoch} an epoch x {args.num_train_epochs:g} epochs"
        f"{f', stopped at --max_steps {args.max_steps}' if args.max_steps > 0 else ''} = {steps}\n"
        f"optimizer       {args.optim.value}, learning rate {args.learning_rate:g}, "
        f"{f'DeepSpeed ZeRO stage {zero}' if zero else 'no DeepSpeed'}, weights in {model_args.dtype}\n"
        f"one example, learned tokens between >> <<:\n{mark(ids, labels, collator.processor)}\n",
        flush=True,
    )


def describe_cost(plan):
    """What a dry run adds: the memory plan, computed. Main process only."""
    if plan:
        print(f"memory a GPU    peak {plan['peaks']['largest']:.1f} GiB at the largest picture (computed):")
        for name, gib in plan["items"].items():
            print(f"    {name:<28}{gib:7.2f}")


def mark(ids, labels, processor):
    """Decoded text of one sequence: runs of image tokens counted, supervised tokens between >> and <<."""
    text, i = "", 0
    image = processor.image_token_id
    while i < len(ids):
        j, learned = i, labels[i] != -100
        while j < len(ids) and (labels[j] != -100) == learned and (ids[j] == image) == (ids[i] == image):
            j += 1
        run = f"<image>x{j - i}" if ids[i] == image else processor.tokenizer.decode(ids[i:j])
        text += f">>{run}<<" if learned else run
        i = j
    return text


def commit() -> str | None:
    """Of this repository, wherever it is called from; None without git, or in a copy that is no clone."""
    git = os.path.join(os.path.dirname(settings.__file__), ".git")
    try:
        done = subprocess.run(["git", f"--git-dir={git}", "rev-parse", "HEAD"], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def record_run(config, args, model_args, summary):
    """What runs, as a dict for run.json: the settings that must match on a resume first, then all the others."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "trl", "accelerate", "deepspeed")}
    versions |= {name: metadata.version(name) for name in ("bitsandbytes", "datasets", "pillow", "peft")}
    return {
        "world_size": args.world_size,
        "effective_batch": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "labels": config.labels,
        "question": config.question,
        "data": summary["train"]["fingerprint"],
        "commit": commit(),
        "versions": {"python": platform.python_version(), **versions},
        "config": dataclasses.asdict(config),
        "model": dataclasses.asdict(model_args),
        "training": args.to_dict(),
    }
