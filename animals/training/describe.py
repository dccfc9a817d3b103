"""What a training run is about to do: its steps, the text for the console, the record for run.json. No torch."""

import dataclasses
import itertools
import math
import os
import platform
import shutil
import statistics
import subprocess
from importlib import metadata

import config as settings


def batch_sizes(args) -> tuple[int, int, int]:
    """(pictures per micro-batch, micro-batches per rank and step, ranks): their product is the effective batch."""
    return args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size


def count_pictures(config, summary) -> int:
    """How many pictures the run trains on, from the summary of the training split (batches.choose_examples)."""
    return sum(min(n, config.examples_per_class or n) for n in summary["classes"].values())


def count_steps(args, pictures) -> tuple[int, int]:
    """(optimizer steps per epoch, optimizer steps in all), as transformers.Trainer counts them."""
    micro_batch, accumulation, ranks = batch_sizes(args)
    if args.dataloader_drop_last:  # drops what fills no micro-batch on every rank; batch_rebalance: no step
        rounds = accumulation if args.train_sampling_strategy == "batch_rebalance" else 1
        pictures -= pictures % (micro_batch * rounds * ranks)
    per_epoch = max(1, math.ceil(pictures / (micro_batch * accumulation * ranks)))
    return per_epoch, args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)


def count_events(args, pictures) -> tuple[int, int]:
    """(evaluations, checkpoints) of a complete run: at every multiple of the interval, and at the end."""
    per_epoch, steps = count_steps(args, pictures)

    def count(strategy, interval, delay=0):
        length, every = (steps / per_epoch, 1) if strategy == "epoch" else (steps, interval)
        if strategy == "no" or delay > length:
            return 0
        if every < 1:  # a share of all steps
            every = math.ceil(steps * every) or steps
        too_early = max(0, math.ceil(delay) - 1) // every  # before --eval_delay
        return int(math.ceil(length / every) - too_early)

    evaluations = count(args.eval_strategy, args.eval_steps, args.eval_delay)
    # best: an evaluation is saved if it is better than all before it, so each of them at most
    saves = evaluations if args.save_strategy == "best" else count(args.save_strategy, args.save_steps)
    return evaluations + args.eval_on_start, saves


def describe(args, model_args, data, collator, in_split: int, held_out: int) -> str:
    """The run in a few lines, as equations, and one example in which the learned tokens are marked."""
    tokens = sorted(data[args.length_column_name])
    micro_batch, accumulation, ranks = batch_sizes(args)
    per_epoch, steps = count_steps(args, len(data))
    stopped = f", stopped at --max_steps {args.max_steps}" if args.max_steps > 0 else ""
    zero = f"DeepSpeed ZeRO stage {args.deepspeed_plugin.zero_stage}" if args.deepspeed_plugin else "no DeepSpeed"
    example = collator([data[0]])
    ids, labels = example["input_ids"][0].tolist(), example["labels"][0].tolist()
    return (
        f"pictures        {len(data)} of {in_split} to train on; {held_out} held out\n"
        f"image tokens    {tokens[0]} to {tokens[-1]} per picture, median {statistics.median(tokens):g}; "
        f"learned in the example below: {sum(label != -100 for label in labels)}\n"
        f"effective batch {micro_batch} per device x {accumulation} accumulated x {ranks} "
        f"{'CPU ranks' if args.use_cpu else 'GPUs'} = {micro_batch * accumulation * ranks} pictures per step\n"
        f"steps           {per_epoch} per epoch x {args.num_train_epochs:g} epochs{stopped} = {steps}\n"
        f"optimizer       {args.optim.value}, learning rate {args.learning_rate:g}, {zero}, "
        f"weights in {model_args.dtype}\n"
        f"one example, learned tokens between >> <<:\n{mark(ids, labels, collator.processor)}\n"
    )


def mark(ids, labels, processor) -> str:
    """The decoded text of one sequence; runs of image tokens are counted, learned tokens stand between >> and <<."""
    text, image = "", processor.image_token_id
    kinds = [(label != -100, token == image) for token, label in zip(ids, labels, strict=True)]
    for (learned, is_image), run in itertools.groupby(range(len(ids)), kinds.__getitem__):
        run = list(run)
        part = f"<image>x{len(run)}" if is_image else processor.tokenizer.decode([ids[i] for i in run])
        text += f">>{part}<<" if learned else part
    return text


def commit() -> str | None:
    """The commit of this repository, wherever it is called from; None without git, or in a copy that is no clone."""
    git = [shutil.which("git"), f"--git-dir={os.path.join(os.path.dirname(settings.__file__), '.git')}"]
    done = git[0] and subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() if done and done.returncode == 0 else None


def record_run(config, args, model_args, summaries) -> dict:
    """What runs, for run.json. First the settings that must be the same when the run is resumed, then all others."""
    names = ("torch", "transformers", "trl", "accelerate", "deepspeed", "bitsandbytes", "datasets", "pillow", "peft")
    choice = [args.metric_for_best_model, config.eval_pictures, summaries["validation"]["fingerprint"]]
    return {
        "best_checkpoint": [*choice, config.early_stopping_patience] if args.load_best_model_at_end else None,
        "world_size": args.world_size,
        "effective_batch": math.prod(batch_sizes(args)),
        "labels": config.labels,
        "question": config.question,
        "data": summaries["train"]["fingerprint"],
        "pictures": count_pictures(config, summaries["train"]),
        "commit": commit(),
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in names},
        "config": dataclasses.asdict(config),
        "model": dataclasses.asdict(model_args),
        "training": args.to_dict(),
    }
