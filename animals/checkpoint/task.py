"""What a checkpoint says about its own task, in task.json: labels, question, wording of the answer, chat format."""

import copy
import hashlib
import json
import os

from animals.checkpoint.check import base_of, holds_model, within_limits
from animals.checkpoint.family import mistakes, read_settings
from animals.checkpoint.steps import saved_steps
from animals.command import Findings, UserError
from animals.files import read_json, write_json
from config import CHAT_TEMPLATE, MAX_TEXT, TASK_FIELDS, Config, task_problems

KEYS = (*TASK_FIELDS, "chat_template")  # of task.json; all but the last are flags too


def task_of(config: Config) -> dict:
    """The content of task.json for a model that is trained with these settings."""
    return {name: getattr(config, name) for name in KEYS}


def write_task(folder, task: dict):
    write_json(os.path.join(folder, "task.json"), task)


def read_task(path) -> dict | None:
    """The task.json of a checkpoint, else of an adapter's base, else of a run's newest checkpoint-N, or None."""
    places = [path, base_of(path)] + ([] if holds_model(path) else [*saved_steps(path).values()][::-1])
    files = [file for file in (os.path.join(place, "task.json") for place in places) if os.path.exists(file)]
    if not files:
        return None
    task = read_json(files[0])
    problems = task_problems(*(task.get(name) for name in TASK_FIELDS))
    problems += mistakes(task.get("chat_template"), (str, 1, 10 * MAX_TEXT), "chat_template: found")
    Findings(f"{files[0]}: {line}; copy it from the run again" for line in problems).report()
    base = base_of(folder := os.path.dirname(files[0]))
    model = read_settings(base, "config.json") or {}
    if task.get("image_view") == "whole" and model.get("model_type", "llava") != "llava":
        raise UserError(
            f"{files[0]}: found the image_view 'whole', which an older version wrote, and tiles in {base}/config.json; "
            f"expected a base of model_type 'llava'; make it, `python scripts/whole_view.py {base} OUT`, and write "
            f"OUT into base_model_name_or_path of {folder}/adapter_config.json"
        )
    return {name: task[name] for name in KEYS}  # older versions had more


def checkpoint_id(path, dtype, config: Config) -> str:
    """Twelve digits that change with the checkpoint's files (name, size, time), its base's, dtype and question.

    dtype: the type in which the model computes, as choose_arithmetic() returns it. config: resolved by settings_for().
    """
    files = []
    for folder in dict.fromkeys([path, base_of(path)]):
        with os.scandir(folder) as entries:
            entries = [e for e in entries if e.is_file() and e.name != "README.md"]  # the card, written after scoring
            files += sorted((e.name, e.stat().st_size, e.stat().st_mtime_ns) for e in entries)
    asked = [config.chat_template, config.question, *map(config.answer_for, config.labels)]
    return hashlib.sha256(repr([files, dtype, asked]).encode()).hexdigest()[:12]


def settings_for(config: Config, path, training=False) -> Config:
    """A copy of the settings with the checkpoint's task. In training flags win; in scoring a contradiction raises."""
    if not training:
        Findings(f"{line}; leave out the flag" for line in changed_task_flags(config, path)).report()
    result, task = copy.copy(config), read_task(path) or {}
    for name in task.keys() - config.given:
        setattr(result, name, task[name])
    return result


def check_template(config: Config, render):
    """Raises UserError unless the chat format, if it is not ours, gives texts of bounded length in bounded time.

    render(label) -> the conversation with this label as text, or with None the question alone.
    """

    def render_all():
        if (n := max(len(render(label)) for label in (None, *config.labels))) > 100 * MAX_TEXT:
            raise ValueError(f"a text of {n:,} characters")

    if config.chat_template != CHAT_TEMPLATE:
        within_limits(render_all, "chat_template of task.json", "a Jinja template that writes the conversation")


def changed_task_flags(config: Config, path) -> list[str]:
    """One line for each given flag that contradicts the task of the checkpoint in `path`.

    Another table is accepted if it has the same labels in the same order, and each trained folder keeps its label.
    """
    task, lines = read_task(path) or {}, []
    for name in sorted(task.keys() & config.given):
        given, trained = getattr(config, name), task[name]
        same = given == trained
        if name == "folder_to_label":
            labels = [list(dict.fromkeys(table.values())) for table in (given, trained)]
            same = labels[0] == labels[1] and all(trained.get(f, label) == label for f, label in given.items())
        if not same:
            given, trained = (json.dumps(value, ensure_ascii=False) for value in (given, trained))
            lines.append(f"--{name}: found {given}; expected {trained}, with which {path} was trained")
    return lines
