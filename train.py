"""Fine-tune LLaVA-1.6-Mistral-7B to name the animal in a picture: TRL's SFTTrainer, DeepSpeed ZeRO-3, 8-bit AdamW.

`sh train.sh` starts it; that file shows examples. Takes the flags of trl.SFTConfig, trl.ModelConfig and config.py, and
two that today's libraries have renamed: --torch_dtype (now --dtype) and --warmup_ratio (now --warmup_steps below 1).
Leaves in --output_dir a plain Hugging Face checkpoint under the hub's parameter names and checkpoint-N/ to resume from,
in --logging_dir TensorBoard's events.
"""

import argparse
import difflib
import functools
import os
import re
import shlex
import signal
import sys

import config as settings
from animals.checkpoint import steps
from animals.checkpoint.card import write_card
from animals.checkpoint.load import load_for_training, zero3_is_on
from animals.checkpoint.task import changed_task_flags, settings_for
from animals.command import Findings, UserError, range_problems, run, with_underscores
from animals.compat import never_compile_shared_memory_op, run_exit_functions
from animals.files import read_json, write_json
from animals.pictures.cache import load_split
from animals.ranks import barrier, check_connection, choose_arithmetic, end_with_parent, main_process, say
from animals.scoring.scorer import stratified_sample
from animals.training.batches import PictureCollator, balanced_weights, choose_examples
from animals.training.describe import count_steps, describe, record_run
from animals.training.lora import describe_trainable, lora_config
from animals.training.parts import ALL, RATES, freeze, read_parts
from animals.training.preflight import check_run, flag_problems

# Without it, DeepSpeed runs numactl whenever CPU ranks reduce gradients: a fifth of the time of the demo's steps.
os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))


def make_parser():
    """The parser of all flags. It raises UserError where argparse would exit."""
    from trl import ModelConfig, SFTConfig, TrlParser

    class Parser(TrlParser):
        def error(self, message):
            raise UserError(f"{message}; `python train.py --help` lists every flag")

    about = {"description": __doc__.partition("\n")[0], "conflict_handler": "resolve"}
    parser = Parser((SFTConfig, ModelConfig), allow_abbrev=False, **about)
    settings.add_flags(parser, (*settings.DATA_FIELDS, *settings.TRAINING_FIELDS, *RATES))
    for name, today in (("--torch_dtype", "dtype"), ("--warmup_ratio", "warmup_steps")):
        kind = {"choices": ["auto", "bfloat16", "float16", "float32"]} if today == "dtype" else {"type": float}
        parser.add_argument(name, dest=today, default=argparse.SUPPRESS, help=f"older name of --{today}", **kind)
    parser.add_argument("--report_to", nargs="+", help="trackers, e.g. tensorboard,wandb; or none")  # instead of TRL's
    parser.add_argument("--dry_run", action="store_true", help="check everything, say what would run, and end there")
    text = "measure a few steps and a checkpoint, and keep nothing; `all`: find the fastest recipe first (train.sh)"
    parser.add_argument("--rehearse", nargs="?", const="run", choices=["run", "all"], help=text)
    text = "ZeRO-3 on GPUs: hold back the host in the forward pass, if --rehearse reports that memory had to be freed"
    parser.add_argument("--wait_in_forward", action="store_true", help=text)
    parser.set_defaults(**settings.TRAINING_DEFAULTS, dataloader_num_workers=None)
    return parser


def parse(argv):
    """-> (Config, SFTConfig, ModelConfig, all flags as a namespace). Unknown and shortened flags raise UserError.

    SFTConfig must be built before the weights load and stay referenced: by a weak reference to it transformers knows
    that ZeRO-3 is on (integrations/deepspeed.py). Without that, every rank loads all 15 GB.
    """
    parser = make_parser()
    flags, unknown = parser.parse_known_args(with_underscores(argv))
    if unknown:
        names = [word for word in unknown if word.startswith("-")] or unknown
        word, known = names[0].split("=")[0], re.findall(r"--\w+", parser.format_usage())
        related = [flag for flag in known if flag.split("_")[0] == word.split("_")[0]]  # the same first word: rather
        near = difflib.get_close_matches(word, related, 1, 0.8) or difflib.get_close_matches(word, known, 1, 0.8)
        parser.error(f"unknown flag {' '.join(names)}" + (f" (did you mean {near[0]}?)" if near else ""))
    flags.report_to = [name for word in flags.report_to for name in word.split(",") if name]
    if flags.early_stopping_patience:
        flags.load_best_model_at_end = flags.restore_callback_states_from_checkpoint = True
        flags.metric_for_best_model = flags.metric_for_best_model or "accuracy"
    if flags.rehearse and flags.eval_strategy == "no":  # a recipe of --rehearse all
        flags.load_best_model_at_end = False
    Findings(range_problems(vars(flags)) + flag_problems(flags, parser.get_default)).report()
    flags.train_parts = flags.train_parts or ("none" if flags.use_peft else ALL)
    on_cpu, flags.dtype = choose_arithmetic(flags.use_cpu, flags.dtype)
    if on_cpu:
        never_compile_shared_memory_op()
        flags.use_cpu, flags.bf16 = True, flags.bf16 and flags.dtype != "float32"
    if flags.dataloader_num_workers is None:  # processes per rank that prepare pictures while the GPU computes
        flags.dataloader_num_workers = 0 if on_cpu else 2
    try:
        args, model_args = parser.parse_dict(vars(flags), allow_extra_keys=True)
    except ValueError as error:
        parser.error(str(error))
    return settings.config_from(flags), args, model_args, flags


def end_rank(code):
    """End this process without the interpreter's shutdown: there, a thread of torch can abort a finished run."""
    run_exit_functions()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def follow_launcher():
    """A rank of torchrun dies with it, or it would go on writing. A lone rank, until it trains, says how it ends."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return end_with_parent()

    def end(number, frame):
        say(f"\n{signal.Signals(number).name}: ended before training began; there was nothing to save")
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, end)


def publish_if_finished(args, checkpoint, last_step, pictures, scorer, record) -> bool:
    """Whether a run ended at `checkpoint`: then copy its model to output_dir. Trainer would take one more step."""
    why, state = steps.finished(checkpoint, last_step), read_json(os.path.join(checkpoint, steps.STATE))
    if why and main_process():
        steps.copy_model_to_output(checkpoint, args, state, pictures)
        write_card(args.output_dir, scorer, state, record)
        say(f"{checkpoint} {why}: nothing is left to train; {args.output_dir} holds the model")
    return bool(why)


def main():
    # Settings: the flags, and the checkpoint's own task.
    follow_launcher()
    given, args, model_args, flags = parse(sys.argv[1:])
    path = model_args.model_name_or_path
    config = settings_for(given, path, training=True)
    for line in changed_task_flags(given, path):
        say(f"{line}: this run trains with the new one")

    # Checks: everything that can be known to be wrong, in one message, before the weights load.
    if main_process():
        steps.delete_old_rehearsal(args.output_dir)
    barrier()
    summaries, scorer = check_run(config, args, model_args)
    record = record_run(config, args, model_args, summaries)
    last_step = count_steps(args, record["pictures"])[1]
    if not flags.dry_run:
        steps.lock_output(args.output_dir, flags.rehearse)
    checkpoint = None if flags.rehearse else steps.find_start(args, record, last_step)

    # Data: the cached conversations, and what is learned of them.
    train_data, held_out = (load_split(config, split, summaries[split]) for split in ("train", "validation"))
    train_data = choose_examples(train_data, config.examples_per_class, args.seed)
    weights = balanced_weights(train_data["label"]) if config.class_weights else None
    collator = PictureCollator(scorer.processor, args.assistant_only_loss, config.chat_template, weights)
    say(describe(args, model_args, train_data, collator, summaries["train"]["n"], len(held_out)))
    held_out = held_out.select(stratified_sample(held_out["label"], config.eval_pictures))
    chosen_on = list(held_out["sha256"])
    if flags.dry_run or checkpoint and publish_if_finished(args, checkpoint, last_step, chosen_on, scorer, record):
        return

    # Model and trainer: under ZeRO-3 the weights are partitioned over the ranks while they load.
    check_connection(args.device)
    if flags.rehearse:
        from animals.training.rehearsal import HostRam, RehearsalTrainer

        make_trainer = functools.partial(RehearsalTrainer, ram=HostRam(args.use_cpu))
    else:
        from animals.training.trainer import AnimalTrainer as make_trainer
    model = load_for_training(model_args, args)
    if checkpoint:
        say(f"resuming from {checkpoint}")
        args.eval_on_start = False  # it was measured when the run began
    os.environ["TENSORBOARD_LOGGING_DIR"] = logs = os.path.join(config.logging_dir, steps.run_name(args.output_dir))
    data = {"train_dataset": train_data, "eval_dataset": held_out, "data_collator": collator}
    ours = {"scorer": scorer, "record": record, "dtype": model_args.dtype, "wait": flags.wait_in_forward}
    trainer = make_trainer(model=model, args=args, peft_config=lora_config(model_args, args), **data, **ours)
    freeze(trainer.model, read_parts(config.train_parts), float32=not zero3_is_on(args))  # with LoRA's adapters in it
    say(f"trains          {describe_trainable(trainer.model)}")
    code = trainer.rehearse(logs) if flags.rehearse else train(trainer, checkpoint)
    trainer.accelerator.end_training()
    end_rank(code or 0)


def train(trainer, checkpoint):
    """Train from `checkpoint`, or from the first step, and save the model. -> exit code: a signal ends it before."""
    from transformers import EarlyStoppingCallback

    from animals.training.signals import StopOnSignal

    config, out = trainer.scorer.config, trainer.args.output_dir
    trainer.add_callback(stop := StopOnSignal(config.max_hours))
    if config.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(config.early_stopping_patience))
    if main_process():
        write_json(os.path.join(out, "run.json"), trainer.record)
    trainer.train(resume_from_checkpoint=checkpoint)
    signal.setitimer(signal.ITIMER_REAL, 0)  # of --max_hours
    step, last = trainer.state.global_step, trainer.state.max_steps
    if stop.agreed:
        again = "`sh train.sh` again continues from there"
        if trainer.args.save_only_model:
            again = "no run can continue from there, because --save_only_model leaves out the optimizer's states"
        say(f"stopped after step {step} of {last}; {again}")
    elif step < last:
        say(f"stopped after step {step} of {last} by --early_stopping_patience {config.early_stopping_patience}")
    if stop.agreed not in (0, signal.SIGALRM):
        return 128 + stop.agreed
    trainer.save_final()
    say(f"\nsaved {out}. Next:\n    sh validation.sh --model_name_or_path {shlex.quote(out)}")


if __name__ == "__main__":
    try:
        run(main)
    except SystemExit as ended:  # of a mistake or a signal
        end_rank(ended.code or 0)
