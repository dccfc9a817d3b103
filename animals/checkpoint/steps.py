"""The checkpoint-N of a run: which one to go on from (the newest complete one, check_resume()), their names, the sweep.

A checkpoint is complete when every file that its complete.json lists is there at its full size; trainer.py writes that
list last and then makes the folder appear by a rename. Imports no torch.
"""

import json
import os
import re
import shutil

from animals.checkpoint.check import holds_model
from animals.command import UserError

MANIFEST = "complete.json"  # the last file of a checkpoint: name -> bytes of every other one
SAVING = ".saving"  # in output_dir: what is being written


def write_manifest(folder):
    """List every file of `folder` with its size, and have the disk hold it all before anything is renamed."""
    sizes = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            sizes[os.path.relpath(path, folder)] = os.path.getsize(path)
    with open(os.path.join(folder, MANIFEST), "w", encoding="utf-8") as file:
        json.dump(sizes, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def missing_files(folder) -> list[str]:
    """What `folder` lacks of its manifest: [] for a complete checkpoint."""
    try:
        with open(os.path.join(folder, MANIFEST), encoding="utf-8") as file:
            sizes = json.load(file)
    except (OSError, ValueError):
        return [MANIFEST]
    found = {name: os.path.join(folder, name) for name in sizes}
    return [n for n, path in found.items() if not os.path.isfile(path) or os.path.getsize(path) != sizes[n]]


def newest_complete(output_dir) -> tuple[str | None, list[str]]:
    """The newest complete checkpoint, and a line for each newer one that is passed over."""
    passed_over = []
    if os.path.isdir(os.path.join(output_dir, SAVING)):
        passed_over += [
            f"{output_dir}/{SAVING}/{name}: was being written when the run ended; passed over"
            for name in sorted(os.listdir(os.path.join(output_dir, SAVING)))
        ]
    for path in reversed(saved_steps(output_dir).values()):
        lacking = missing_files(path)
        if not lacking:
            return path, passed_over
        passed_over.append(f"{path}: incomplete ({', '.join(lacking[:3])} missing or cut short); passed over")
    return None, passed_over


def read_state(checkpoint) -> dict:
    """trainer_state.json of a checkpoint: global_step, best_model_checkpoint, log_history ..."""
    with open(os.path.join(checkpoint, "trainer_state.json"), encoding="utf-8") as file:
        return json.load(file)


FOR_RESUMING = re.compile(
    r"global_step|latest|scheduler|optimizer|rng_state|trainer_state|zero_to_|run\.json|complete\.json|README\.md|trained_float32"
)


def rehearsal_folder(output_dir):
    """Where `train.sh --rehearse` writes its checkpoint."""
    return f"{os.path.normpath(output_dir)}.rehearsal"


def sweep(output_dir):
    """Delete what a rehearsal left, if it was killed; a folder that holds anything else is not ours. Main process."""
    folder = rehearsal_folder(output_dir)
    names = os.listdir(folder) if os.path.isdir(folder) else ["nothing to sweep"]
    if all(name in (SAVING, "README.md") or name.startswith("checkpoint-") for name in names):
        shutil.rmtree(folder)


def publish(checkpoint, output_dir):
    """Copy the model of a complete checkpoint into output_dir, without what only resuming needs. Main process only."""
    saving = os.path.join(output_dir, SAVING)
    shutil.rmtree(saving, ignore_errors=True)
    shutil.copytree(checkpoint, saving, ignore=lambda _, names: [n for n in names if FOR_RESUMING.match(n)])
    move_in(saving, output_dir)


def move_in(saving, output_dir):
    """The files of a whole model out of .saving, config.json last: by it readers know a checkpoint. Main process."""
    for name in sorted(os.listdir(saving), key=lambda name: (name == "config.json", name)):
        os.replace(os.path.join(saving, name), os.path.join(output_dir, name))
    os.rmdir(saving)


def checkpoint_name(path):
    """`runs/sft/checkpoint-100` -> `sft-checkpoint-100`, `sft-llava-1.6-7b` -> itself: the report's folder name."""
    parts = os.path.abspath(path).split(os.sep)
    return "-".join(parts[-2:]) if parts[-1].startswith("checkpoint-") else parts[-1]


def run_name(path):
    """The name under which train.py logs to TensorBoard: of the run's folder, for a checkpoint-N in it too."""
    path = os.path.abspath(path)
    return os.path.basename(os.path.dirname(path) if os.path.basename(path).startswith("checkpoint-") else path)


def saved_steps(path):
    """{N: folder} of the checkpoint-N in a run's folder, in order; {} for a folder that is not there."""
    names = os.listdir(path) if os.path.isdir(path) else []
    found = {int(name[11:]): name for name in names if re.fullmatch(r"checkpoint-\d+", name)}
    return {step: os.path.join(path, found[step]) for step in sorted(found)}


def global_step(path):
    """After how many optimizer steps it was saved: trainer_state.json, else its name, else the run's last; or None."""
    if os.path.isfile(os.path.join(path, "trainer_state.json")):
        return read_state(path)["global_step"]
    named = re.fullmatch(r"checkpoint-(\d+)", os.path.basename(os.path.abspath(path)))
    return int(named[1]) if named else max(saved_steps(path), default=None)


def find_checkpoints(path):
    """Every checkpoint-N of a run, in order, and the final model if it is there; fit for use or not.

    Raises UserError if there is none.
    """
    found = list(saved_steps(path).values())
    if holds_model(path):
        found.append(path)
    if not found:
        raise UserError(
            f"--all_checkpoints: found no checkpoint-N and no model in {path}; expected the output folder of a "
            "training; name it with --model_name_or_path"
        )
    return found


# What a resumed run must share with the one that wrote the checkpoint, and why.
MUST_MATCH = {
    "world_size": "DeepSpeed's optimizer state is cut into one part a rank",
    "effective_batch": "the position in the epoch would be another",
    "training.per_device_train_batch_size": "the order of the pictures would be another",
    "training.train_sampling_strategy": "the order of the pictures would be another",
    "training.seed": "the order of the pictures would be another",
    "training.data_seed": "the order of the pictures would be another",
    "model.dtype": "the weights would be rounded otherwise",
    "config.image_view": "the pictures would be seen otherwise",
    "config.train_parts": "the optimizer's states are of other weights",
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
