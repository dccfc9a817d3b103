"""Which checkpoint a run goes on from: the newest complete one, written by a run with the same essentials.

A checkpoint is complete when every file that its complete.json lists is there at its full size; trainer.py writes that
list last and then makes the folder appear by a rename. Imports no torch.
"""

import json
import os
import re
import shutil

from config import UserError

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


def find_checkpoint(output_dir) -> tuple[str | None, list[str]]:
    """The newest complete checkpoint, and a line for each newer one that is passed over."""
    passed_over = []
    if os.path.isdir(os.path.join(output_dir, SAVING)):
        passed_over += [
            f"{output_dir}/{SAVING}/{name}: was being written when the run ended; passed over"
            for name in sorted(os.listdir(os.path.join(output_dir, SAVING)))
        ]
    steps = [
        int(name.removeprefix("checkpoint-"))
        for name in (os.listdir(output_dir) if os.path.isdir(output_dir) else [])
        if name.startswith("checkpoint-") and name.removeprefix("checkpoint-").isdigit()
    ]
    for step in sorted(steps, reverse=True):
        path = os.path.join(output_dir, f"checkpoint-{step}")
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
    r"global_step|latest|scheduler|optimizer|rng_state|trainer_state|zero_to_|run\.json|complete\.json"
)


def publish(checkpoint, output_dir):
    """Copy the model of a complete checkpoint into output_dir, without what only resuming needs. Main process only."""
    saving = os.path.join(output_dir, SAVING)
    shutil.rmtree(saving, ignore_errors=True)
    shutil.copytree(checkpoint, saving, ignore=lambda _, names: [n for n in names if FOR_RESUMING.match(n)])
    for name in sorted(os.listdir(saving), key=lambda name: (name == "config.json", name)):  # config.json last
        os.replace(os.path.join(saving, name), os.path.join(output_dir, name))
    os.rmdir(saving)


# What a resumed run must share with the one that wrote the checkpoint, and why.
MUST_MATCH = {
    "world_size": "DeepSpeed's optimizer state is cut into one part a rank",
    "effective_batch": "the position in the epoch would be another",
    "labels": "the answers would be others",
    "question": "the prompt would be another",
    "data": "the training pictures changed",
}


def check_resume(record, checkpoint):
    """The checkpoint's run.json agrees with this run's `record` in MUST_MATCH."""
    with open(os.path.join(checkpoint, "run.json"), encoding="utf-8") as file:
        before = json.load(file)
    changed = [
        f"{key} was {before.get(key)!r}, is {record[key]!r} ({why})"
        for key, why in MUST_MATCH.items()
        if before.get(key) != record[key]
    ]
    if changed:
        raise UserError(
            f"{checkpoint} cannot be resumed with these settings: {'; '.join(changed)}; restore them, or start anew "
            "with another --output_dir"
        )
