"""The checkpoint-N folders of a run: what makes one complete, which one to resume from, and their names.

A checkpoint is complete when its complete.json is there, and with it every file that complete.json lists, at its full
size. trainer.py writes that list last, so a folder that a killed run left behind is never complete. Imports no torch.
"""

import atexit
import contextlib
import json
import os
import re
import shutil
from pathlib import Path

from animals.command import UserError
from animals.files import folder_lock, read_json, replacing, write_json
from animals.ranks import barrier, main_process, say

MANIFEST = "complete.json"  # the last file of a checkpoint: name -> size in bytes of every other file
STATE = "trainer_state.json"  # transformers' own: global_step, best_model_checkpoint, log_history
CHOSEN = "chosen.json"  # in output_dir, if its model is the best of the run: step, metric, value, pictures (sha256)
SAVING = ".saving"  # a folder in output_dir, in which the final model is written before it is moved into output_dir
ONLY_FOR_RESUMING = re.compile(  # beginnings of the names in a checkpoint that the final model does not have
    r"global_step|latest|scheduler|optimizer|rng_state|trainer_state|zero_to_|trained_float32|(run|complete)\.json|README"
)


def write_manifest(folder):
    """List every file of `folder` with its size in MANIFEST, which makes the checkpoint complete.

    The disk holds all files before MANIFEST appears, and all names before older checkpoints are deleted.
    """
    files = [os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names]
    flush_to_disk(*files, *{os.path.dirname(path) for path in files})
    manifest = os.path.join(folder, MANIFEST)
    with replacing(manifest) as file:  # without a last newline, so that one byte less is no JSON
        json.dump({os.path.relpath(path, folder): os.path.getsize(path) for path in files}, file)
    flush_to_disk(manifest, folder, os.path.dirname(os.path.abspath(folder)))


def flush_to_disk(*paths):
    """Wait until the disk holds the content of these files, and the names in these folders."""
    for path in paths:
        opened = os.open(path, os.O_RDONLY)
        os.fsync(opened)
        os.close(opened)


def missing_files(folder) -> list[str]:
    """The files that `folder` lacks or that are cut short; [] for a complete checkpoint."""
    try:
        sizes = read_json(os.path.join(folder, MANIFEST))
    except (OSError, UserError):
        return [MANIFEST]
    found = {name: Path(folder, name) for name in sizes if name != "README.md"}  # peft's card: validation.py adds to it
    return [name for name, file in found.items() if not file.is_file() or file.stat().st_size != sizes[name]]


def finished(path, last_step) -> str | None:
    """Why nothing is left to train after the checkpoint `path`; None if something is."""
    if global_step(path) >= last_step:
        return "is the last step"
    stop = (read_json(os.path.join(path, STATE)).get("stateful_callbacks") or {}).get("EarlyStoppingCallback")
    if stop and stop["attributes"]["early_stopping_patience_counter"] >= stop["args"]["early_stopping_patience"]:
        return "ended its run early, by --early_stopping_patience"


def unusable(path, states=None, last_step=None) -> str | None:
    """Why no run can go on from the folder `path`; None if one can.

    states: the file by which a checkpoint has the optimizer's states, if they are needed: not where a run finished().
    """
    if lacking := missing_files(path):
        return f"incomplete ({', '.join(lacking[:3])} missing or cut short)"
    if states and not os.path.isfile(os.path.join(path, states)) and not finished(path, last_step):
        return f"without the optimizer's states ({states}): saved with --save_only_model or another --config_file"


def states_file(deepspeed: bool) -> str:
    """The file of a checkpoint that shows that it has the optimizer's states, of DeepSpeed or of plain torch."""
    return "latest" if deepspeed else "optimizer.pt"


def newest_complete(output_dir, *needs) -> tuple[str | None, list[str]]:
    """The newest usable checkpoint or None, and a line of text for each newer one. needs: see unusable()."""
    passed_over = []
    for path in reversed(saved_steps(output_dir).values()):
        if not (why := unusable(path, *needs)):
            return path, passed_over
        passed_over.append(f"{path}: {why}; it is not used")
    return None, passed_over


def delete_incomplete(output_dir):
    """Delete each incomplete checkpoint-N: --save_total_limit would count it. Main process only, before a save."""
    for path in saved_steps(output_dir).values():
        if missing_files(path):
            say(f"{path} is incomplete and is deleted")
            shutil.rmtree(path, ignore_errors=True)


def rehearsal_folder(output_dir):
    """The folder in which `train.sh --rehearse` writes its checkpoint."""
    return f"{os.path.normpath(output_dir)}.rehearsal"


def delete_old_rehearsal(output_dir):
    """Delete what a killed rehearsal left, unless it holds anything else. Main process only. UserError if it runs."""
    folder = rehearsal_folder(output_dir)
    if os.path.isdir(folder) and all(re.match("README.md$|checkpoint-", name) for name in os.listdir(folder)):
        with run_lock(folder):
            shutil.rmtree(folder)


def run_lock(folder, shared=False):
    """folder_lock() for the folder that a run or a rehearsal writes to; UserError if another one holds it."""
    do = "wait until it ends, or choose another --output_dir"
    return folder_lock(folder, shared, busy=f"{folder}: found another run that writes to it; expected none; {do}")


def lock_output(output_dir, rehearse):
    """Keep other runs out of output_dir, or of the rehearsal's own new folder, while this process lives. All ranks."""
    barrier()  # all ranks have seen that no other run is there
    if not main_process():
        return
    folder = rehearsal_folder(output_dir) if rehearse else output_dir
    if rehearse and os.path.exists(folder):  # main() has deleted what another rehearsal left
        raise UserError(
            f"{folder}: found {', '.join(sorted(os.listdir(folder))[:3])} in it; expected no such folder, for the "
            "rehearsal writes its checkpoint there; move it, or choose another --output_dir"
        )
    os.makedirs(folder, exist_ok=True)
    lock = contextlib.ExitStack()
    lock.enter_context(run_lock(folder))
    atexit.register(lock.close)
    if rehearse:
        atexit.register(shutil.rmtree, folder, ignore_errors=True)


def copy_model_to_output(checkpoint, args, state, pictures):
    """Copy the model of a complete checkpoint into output_dir, without ONLY_FOR_RESUMING. Main process only.

    With --load_best_model_at_end that of the best one, by the content of a STATE, and CHOSEN with these pictures.
    """
    saving, step = os.path.join(args.output_dir, SAVING), args.load_best_model_at_end and state.get("best_global_step")
    if step:  # beside `checkpoint`; in another folder if this run was resumed from there
        places = os.path.join(os.path.dirname(checkpoint), f"checkpoint-{step}"), state["best_model_checkpoint"]
        if not (checkpoint := next((place for place in places if place and not missing_files(place)), None)):
            raise UserError(f"{places[0]}: found no complete checkpoint; expected the best one; copy it there again")
    shutil.rmtree(saving, ignore_errors=True)
    shutil.copytree(checkpoint, saving, ignore=lambda _, names: [n for n in names if ONLY_FOR_RESUMING.match(n)])
    if step:
        metric, value = args.metric_for_best_model, state["best_metric"]
        chosen = {"step": step, "metric": metric, "value": value, "pictures": pictures}
        write_json(os.path.join(saving, CHOSEN), chosen)
        say(f"the best checkpoint is {checkpoint}: {metric} {value:.4f} on {len(pictures)} held-out pictures")
    move_model(saving, args.output_dir)


def move_model(saving, output_dir):
    """Move a model from .saving into output_dir, config.json last: until then the folder is no model. Main process."""
    last = "adapter_config.json", "config.json"
    for name in (*last, CHOSEN, "README.md"):  # of the model that was there
        Path(output_dir, name).unlink(missing_ok=True)
    for name in sorted(os.listdir(saving), key=lambda name: (name in last, name)):
        os.replace(os.path.join(saving, name), os.path.join(output_dir, name))
    os.rmdir(saving)


def checkpoint_name(path):
    """The name of a report's folder: `runs/sft/checkpoint-100` -> `sft-checkpoint-100`, `runs/sft` -> `sft`."""
    name = os.path.basename(os.path.abspath(path))
    return f"{run_name(path)}-{name}" if name.startswith("checkpoint-") else name


def run_name(path):
    """The run's name in TensorBoard: `runs/sft` and `runs/sft/checkpoint-100` -> `sft`."""
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.basename(folder) if name.startswith("checkpoint-") else name


def saved_steps(path):
    """{N: folder} of each checkpoint-N in a run's folder, complete or not, by N; {} if there is no such folder."""
    names = [name for name in os.listdir(path) if re.fullmatch(r"checkpoint-\d+", name)] if os.path.isdir(path) else []
    return dict(sorted((int(name[11:]), os.path.join(path, name)) for name in names))


def global_step(path):
    """The optimizer step at which `path` was saved: by trainer_state.json, else its name, else the run's last step."""
    state = os.path.join(path, STATE)
    if os.path.isfile(state):
        if type(step := read_json(state).get("global_step")) is not int:
            raise UserError(f"{state}: found the global_step {step!r}; expected a whole number; copy the file again")
        return step
    named = re.fullmatch(r"checkpoint-(\d+)", os.path.basename(os.path.abspath(path)))
    return int(named[1]) if named else max(saved_steps(path), default=None)


# What a resumed run must have in common with the run that wrote the checkpoint, and why.
MUST_MATCH = {
    "world_size": "DeepSpeed's optimizer state is cut into one part per rank",
    "effective_batch": "the position in the epoch would be different",
    "training.per_device_train_batch_size": "the order of the pictures would be different",
    "training.train_sampling_strategy": "the order of the pictures would be different",
    "training.seed": "the order of the pictures would be different",
    "training.data_seed": "the order of the pictures would be different",
    "model.dtype": "the weights would be rounded differently",
    "training.learning_rate": "the schedule goes on with the old rate",
    "config.vision_learning_rate": "the optimizer's groups would be others",
    "config.projector_learning_rate": "the optimizer's groups would be others",
    "config.train_parts": "the optimizer's states are of other weights",
    "model.use_peft": "the optimizer's states are of other weights",
    "config.class_weights": "the loss would be another one",
    "config.examples_per_class": "the run would go on with other pictures",
    "best_checkpoint": "the best one is chosen by the same metric, pictures and patience in the whole run",
    "labels": "the answers would be different",
    "question": "the prompt would be different",
    "data": "the training pictures changed",
}


def check_resume(record, checkpoint):
    """Raise UserError if the checkpoint's run.json and this run's `record` differ in a key of MUST_MATCH."""
    before, changed = read_json(os.path.join(checkpoint, "run.json")), []
    for key, why in MUST_MATCH.items():
        *group, name = key.split(".")
        parts = (run.get(*group) if group else run for run in (before, record))
        was, now = (part.get(name) if isinstance(part, dict) else None for part in parts)
        if was != now and (name, was, now) != ("train_parts", "vision,projector,language", "none"):  # older LoRA runs
            changed.append(f"{name} was {was!r}, is {now!r} ({why})")
    if changed:
        raise UserError(
            f"{checkpoint} cannot be resumed with these settings: {'; '.join(changed)}; restore them, or start anew "
            "with another --output_dir"
        )


def find_start(args, record, last_step):
    """The checkpoint to go on from, or None: a new run. UserError if --resume_from_checkpoint names no usable one.

    It needs the optimizer's states, unless it is of the last step. Says which newer ones are passed over.
    """
    chosen, needs = args.resume_from_checkpoint, (states_file(bool(args.deepspeed_plugin)), last_step)
    word = str(chosen).lower()
    if word in ("none", "true"):
        chosen, passed_over = newest_complete(args.output_dir, *needs)
        for line in passed_over:
            say(line)
        if not chosen and (model := newest_complete(args.output_dir)[0]):
            raise UserError(
                f"{model}: found a model without the optimizer's states; expected them, to continue; train this model "
                f"further with --model_name_or_path {model} and another --output_dir, or start anew in another one"
            )
        if not chosen and word == "true":
            raise UserError(
                f"--resume_from_checkpoint True: found no complete checkpoint-N in {args.output_dir}; expected one; "
                "without the flag a new run starts"
            )
    elif word == "false":
        raise UserError(
            f"--resume_from_checkpoint: found {chosen}; expected a checkpoint-N or True, the newest one, which is also "
            "what happens without the flag; to start anew, choose another --output_dir"
        )
    elif why := unusable(chosen, *needs):
        there = ", ".join(saved_steps(args.output_dir).values()) or "none"
        raise UserError(
            f"--resume_from_checkpoint {chosen}: found it {why}; expected a complete checkpoint-N; in "
            f"{args.output_dir} there are {there}"
        )
    if chosen:
        check_resume(record, chosen)
    return chosen
