"""Fine-tune LLaVA-1.6-Mistral-7B to name the animal in a picture: TRL's SFTTrainer, DeepSpeed ZeRO-3, 8-bit AdamW.

    sh train.sh                                  # all GPUs it finds, every flag in train.sh
    sh train.sh --num_train_epochs 3             # the command line wins over train.sh
    sh train.sh --rehearse                       # minutes of it, measured beside planned; rehearsal.json in logs/
    NUM_PROCESSES=2 sh train.sh                  # 2 GPUs, or 2 CPU ranks on a machine without a GPU

Takes every flag of config.Config, trl.SFTConfig and trl.ModelConfig, and three that today's libraries dropped:
--torch_dtype (now --dtype), --warmup_ratio (now --warmup_steps below 1) and --logging_dir (now an environment
variable). Leaves in --output_dir a plain Hugging Face checkpoint under the hub's parameter names, checkpoint-N/ with
the optimizer's state to resume from, and TensorBoard events under --logging_dir.
Tried on 1 and 2 CPU ranks with the demo's checkpoint; the figures for 4x RTX 4090 are computed, see scripts/README.md.
"""

import argparse
import ctypes
import difflib
import functools
import os
import re
import signal
import sys

import config as settings
from animals.checkpoint.load import load_for_training
from animals.checkpoint.steps import check_resume, newest_complete, publish, read_state, sweep
from animals.checkpoint.task import other_words, settings_for
from animals.checkpoint.tokens import read_geometry, whole_view_gain
from animals.command import UserError, run
from animals.compat import never_compile_shared_memory_op, run_exit_functions
from animals.files import write_json
from animals.pictures.cache import load_split
from animals.ranks import barrier, choose_arithmetic, cpu_bf16_speed, main_process
from animals.training.batches import PictureCollator
from animals.training.describe import count_steps, describe, describe_cost, record_run
from animals.training.lora import describe_trainable, lora_config
from animals.training.parts import choose_parts
from animals.training.preflight import check_run
from config import Config

# On CPU ranks DeepSpeed else runs numactl whenever it reduces gradients, a fifth of the demo's step.
os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))


def parse(argv):
    """argv -> (Config, SFTConfig, ModelConfig, .dry_run and .rehearse). Unknown and shortened flags raise UserError.

    SFTConfig must exist before the weights load and stay alive: building it tells transformers that ZeRO-3 is on, by
    a weak reference (transformers/integrations/deepspeed.py). Lose it and every rank loads all 15 GB.
    """
    from trl import ModelConfig, SFTConfig, TrlParser

    parser = TrlParser((Config, SFTConfig, ModelConfig), allow_abbrev=False)
    for name, today in (("--torch_dtype", "dtype"), ("--warmup_ratio", "warmup_steps")):
        kind = {"choices": ["auto", "bfloat16", "float16", "float32"]} if today == "dtype" else {"type": float}
        parser.add_argument(name, dest=today, default=argparse.SUPPRESS, help=f"older name of --{today}", **kind)
    parser.add_argument("--dry_run", action="store_true", help="stop before the weights load; say what would run")
    parser.add_argument("--rehearse", action="store_true", help="measure a few steps and a checkpoint; keep nothing")
    parser.set_defaults(**settings.TRAINING_DEFAULTS)

    def fail(message):
        raise UserError(f"{message}; `python train.py --help` lists every flag")

    parser.error = fail
    asked, rest = parser.parse_known_args(argv)
    unknown = [word for word in rest if word.startswith("-")]
    if unknown:
        known = re.findall(r"--\w+", parser.format_usage())
        near = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1, cutoff=0.8)
        fail(f"unknown flag {' '.join(unknown)}" + (f" (did you mean {near[0]}?)" if near else ""))
    on_cpu, dtype = choose_arithmetic(asked.use_cpu, asked.dtype)
    if on_cpu:
        never_compile_shared_memory_op()
        argv = [*argv, "--use_cpu", "True", "--dtype", dtype]
        if dtype == "float32" and cpu_bf16_speed() < 1:
            argv += ["--bf16", "False"]
    else:
        parser.set_defaults(dataloader_num_workers=2)  # processes a rank that prepare pictures while the GPU works
    try:
        config, args, model_args, more = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except ValueError as error:
        fail(str(error))
    return settings_for(config, model_args.model_name_or_path, training=True), args, model_args, more


def end_with_launcher():
    """Linux: have the kernel kill this rank when scripts/launch.py dies, so that no orphan goes on writing."""
    if os.environ.get("LAUNCHER_PID") == str(os.getppid()):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def leave(code):
    """End this rank without the interpreter's shutdown, in which a thread of torch's aborts a finished run.

    Seen once in about 22 runs on two ranks, with the process group destroyed.
    """
    run_exit_functions()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main():
    end_with_launcher()
    if "-h" in sys.argv or "--help" in sys.argv:
        print(__doc__)
    config, args, model_args, more = parse(sys.argv[1:])
    speaks = main_process()  # one rank speaks for all
    for line in other_words(config, model_args.model_name_or_path) if speaks else ():
        print(f"{line}: trained with the new words from here on", flush=True)

    if speaks:
        sweep(args.output_dir)
    barrier()
    # Before the weights load: everything that can be known to go wrong, in one message.
    summary, scorer, plan = check_run(config, args, model_args)
    record = record_run(config, args, model_args, summary)
    resume, passed_over = newest_complete(args.output_dir)
    if args.resume_from_checkpoint:  # the user's word is taken as it is
        resume = args.resume_from_checkpoint
    elif resume:
        check_resume(record, resume)
    if more.rehearse:
        resume = None  # from the first step, whatever is there

    collator = PictureCollator(scorer.processor, args.assistant_only_loss, config.chat_template)
    train_data = load_split(config, "train")
    if speaks:
        describe(args, model_args, train_data, collator, f"{summary['validation']['n']} held out")
        tiles = read_geometry(model_args.model_name_or_path)
        print(whole_view_gain(zip(train_data["width"], train_data["height"], strict=True), tiles), flush=True)
    if more.dry_run:
        if speaks:
            describe_cost(plan)
        return

    state = read_state(resume) if resume else {"global_step": 0}
    if resume and state["global_step"] >= count_steps(args, len(train_data))[1]:  # Trainer would take one step more
        if speaks:
            publish(args.load_best_model_at_end and state["best_model_checkpoint"] or resume, args.output_dir)
            print(f"{resume} is the last step: nothing left to train; {args.output_dir} holds the model")
        return

    from animals.training.trainer import AnimalTrainer, StopOnSignal

    if more.rehearse:
        from animals.training.rehearsal import RehearsalTrainer, begin

        make_trainer = functools.partial(RehearsalTrainer, ram=begin(args), plan=plan)
    else:
        stop = StopOnSignal()
        make_trainer = functools.partial(AnimalTrainer, callbacks=[stop])
    model = load_for_training(model_args, args, config.image_view)
    choose_parts(model, config, args, model_args)
    args.assistant_only_loss = False  # the collator has it; SFTTrainer would look for its own template and refuse ours
    name = os.path.basename(os.path.normpath(args.output_dir))
    os.environ["TENSORBOARD_LOGGING_DIR"] = os.path.join(config.logging_dir, name)
    trainer = make_trainer(
        model=model,
        args=args,
        train_dataset=train_data,
        eval_dataset=load_split(config, "validation"),
        data_collator=collator,
        processing_class=scorer.processor,
        peft_config=lora_config(model_args, args),
        scorer=scorer,
        eval_pictures=config.eval_pictures,
        record=record,
    )
    trains = describe_trainable(trainer.model)  # raises where anything beside LoRA's adapters would train
    if more.rehearse:
        trainer.rehearse(os.environ["TENSORBOARD_LOGGING_DIR"], record["versions"])
        trainer.accelerator.end_training()
        leave(0)
    if speaks:
        print(f"trains          {trains}")
        os.makedirs(args.output_dir, exist_ok=True)
        write_json(os.path.join(args.output_dir, "run.json"), record)
        for line in passed_over:
            print(line)
        if resume:
            print(f"resuming from {resume}", flush=True)
    trainer.train(resume_from_checkpoint=resume)
    if stop.agreed:
        if speaks:
            print(f"stopped after step {trainer.state.global_step}; `sh train.sh` again goes on from there", flush=True)
    else:
        trainer.save_final()
        if speaks:
            print(f"\nsaved {args.output_dir}. Next:\n    sh validation.sh --model_name_or_path {args.output_dir}")
    trainer.accelerator.end_training()
    leave(128 + stop.agreed if stop.agreed else 0)


if __name__ == "__main__":
    run(main)
