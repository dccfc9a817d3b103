"""The model card, README.md of a checkpoint: train.py writes it, validation.py adds what it measured (model-index)."""

import os
import re
from pathlib import Path

from animals.checkpoint.steps import checkpoint_name
from animals.command import UserError
from animals.files import replacing, require_writable


def write_card(folder, scorer, state, record):
    """Write the card anew: how to ask the model, how it was trained. The last three are those of AnimalTrainer."""
    from jinja2 import Template

    template = Template(Path(__file__).with_name("model_card.md").read_text(encoding="utf-8"))
    values = {"folder": folder, "name": checkpoint_name(folder), "scorer": scorer, "state": state, "record": record}
    card = template.render(values, code_span=code_span, repr=repr)
    Path(folder, "README.md").write_text(f"{card}\n", encoding="utf-8")


def read_card(folder):
    """-> huggingface_hub's ModelCard of a model that train.py saved. UserError if it cannot be read or written."""
    from huggingface_hub import ModelCard

    flag, file = "--write_model_card", Path(folder, "README.md")
    if not Path(folder, "task.json").is_file():  # for example the model from the hub
        raise UserError(f"{flag}: found no task.json in {folder}; expected a model of train.py; leave the flag out")
    require_writable(flag, folder)
    try:
        if os.path.lexists(file):
            return ModelCard.load(file)
        return ModelCard(f"---\nlibrary_name: transformers\n---\n\n# {code_span(checkpoint_name(folder))}\n")
    except Exception as error:  # of the system, of yaml, of huggingface_hub
        expected = "expected a model card with metadata that Hugging Face reads; correct it, or move it away"
        raise UserError(f"{flag}: found {' '.join(str(error).split())} in {file}; {expected}") from None


def add_result(folder, report, input_dir):
    """Write numbers of report.json into the card's metadata, in place of earlier ones; nothing else in it changes.

    The task is image-classification: one of the labels is always the answer. The data set has the name of input_dir,
    and the type by which `datasets` loads such a folder.
    """
    from huggingface_hub import EvalResult

    low, high = report["accuracy_ci95"]
    numbers = {"accuracy": report["accuracy"], "accuracy_ci95_low": low, "accuracy_ci95_high": high, "n": report["n"]}
    numbers |= {f"{kind}_in_train": report["duplicates"][kind] for kind in ("identical", "near_duplicates")}
    about = {"task_type": "image-classification", "dataset_type": "imagefolder", "dataset_split": "validation"}
    about["dataset_name"] = os.path.basename(os.path.abspath(input_dir))
    results = [EvalResult(metric_type=k, metric_value=v, **about) for k, v in numbers.items() if v is not None]
    data = (card := read_card(folder)).data
    others = [old for old in data.eval_results or [] if old.unique_identifier != results[0].unique_identifier]
    data.eval_results, data.model_name = others + results, data.model_name or checkpoint_name(folder)
    with replacing(Path(folder, "README.md"), newline="") as file:
        file.write(str(card))


def code_span(text):
    """Markdown that shows a text as it stands, on one line: HTML, templates and backticks have no meaning in it."""
    text = " ".join(text.split())
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks} {text} {ticks}" if "`" in text else f"`{text}`"
