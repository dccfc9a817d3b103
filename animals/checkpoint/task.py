"""What a checkpoint says of itself, in task.json: its labels, question, answer's wording, chat format, view.

Every folder that is saved has one (save.py), so a checkpoint is scored with what it was trained on. The hub's has
none: config.py counts. Imports no torch.
"""

import copy
import json
import os

from animals.checkpoint.check import base_of, holds_model
from animals.checkpoint.steps import saved_steps
from animals.checkpoint.view import is_whole
from animals.command import UserError
from animals.files import read_json, write_json
from config import Config

FILE = "task.json"
WORDS = ("folder_to_label", "prompt", "answer", "image_view")  # the flags among its keys


def task_of(config: Config) -> dict:
    """What task.json will hold."""
    return {name: getattr(config, name) for name in (*WORDS, "chat_template")}


def write_task(folder, task: dict):
    write_json(os.path.join(folder, FILE), task)


def read_task(path) -> dict | None:
    """task.json of a checkpoint; of an adapter without one its base's; of a folder of checkpoint-N the newest's."""
    places = [path, base_of(path)]
    if not holds_model(path):
        places += reversed(saved_steps(path).values())
    file = next((f for f in (os.path.join(place, FILE) for place in places) if os.path.isfile(f)), None)
    if file is None:
        return None
    task = read_json(file)
    if isinstance(task, dict):
        task.setdefault("image_view", "whole" if is_whole(path) else "tiles")  # written before there was a choice
    lost = [name for name in (*WORDS, "chat_template") if not isinstance(task, dict) or name not in task]
    if lost:
        raise UserError(f"{file}: found no {', '.join(lost)} in it; expected what train.py wrote; copy it there again")
    return task


def settings_for(config: Config, path, training=False) -> Config:
    """The settings with which to score the checkpoint in `path`: its own words, where no flag gives others.

    Raises UserError, a line a flag, where a flag contradicts them; training may (other_words() says what changes).
    """
    if is_whole(path) and "image_view" in config.given and config.image_view == "tiles":
        raise UserError(
            f"--image_view tiles: found {path}, trained on whole views; expected the flag away: its weights have no "
            "image_newline, which tiles need; start from the model that it was trained from"
        )
    task = read_task(path)
    if task is None:
        if is_whole(path):
            config.image_view = "whole"
        return config
    if not training and (lines := other_words(config, path)):
        raise UserError("\n".join(f"{line}; leave the flag away" for line in lines))
    result = copy.copy(config)
    result.chat_template = task["chat_template"]
    for name in set(WORDS) - config.given:
        setattr(result, name, task[name])
    return result


def other_words(config: Config, path) -> list[str]:
    """A line for each flag that contradicts what the checkpoint was trained with.

    Another table does not, if it has the same labels in the same order and gives no known folder another one: then
    the pictures merely lie in folders of other names.
    """
    task, lines = read_task(path), []
    for name in WORDS if task else ():
        given, trained = getattr(config, name), task[name]
        same = given == trained
        if name == "folder_to_label":
            labels = [list(dict.fromkeys(table.values())) for table in (given, trained)]
            same = labels[0] == labels[1] and all(trained.get(f, label) == label for f, label in given.items())
        if name in config.given and not same:
            given, trained = (json.dumps(words, ensure_ascii=False) for words in (given, trained))
            lines.append(f"--{name}: found {given}; expected {trained}, with which {path} was trained")
    return lines


def how_to_ask(folder, config: Config, tokens) -> str:
    """Markdown: how the checkpoint in `folder` is asked with transformers alone, for an answer of so many tokens."""
    kind = "LlavaForConditionalGeneration" if config.image_view == "whole" else "LlavaNextForConditionalGeneration"
    return f"""```python
from transformers import AutoProcessor, {kind}

folder, picture = {folder!r}, "picture.jpg"
question = {config.question!r}
model = {kind}.from_pretrained(folder, dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained(folder)
chat = [{{"role": "user", "content": [{{"type": "image", "url": picture}}, {{"type": "text", "text": question}}]}}]
inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
said = model.generate(**inputs.to(model.device, model.dtype), max_new_tokens={tokens})
print(processor.decode(said[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
```"""
