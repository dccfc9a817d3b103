"""Settings of the whole project, in one place. Imports the standard library only.

Each script offers the fields of `Config` that it reads as flags. A later source wins over an earlier one: this file,
what the checkpoint was trained with (its task.json: labels, question, answer, chat format), *.sh, the command line.
"""

import argparse
import contextlib
import json
import os
import re
import reprlib
from dataclasses import dataclass, field, fields

from animals.command import Findings, Parser, UserError, range_problems, yes_or_no
from animals.files import deeper, printable, subfolders

# Name of a class folder -> the word that the model answers. Labels have this order everywhere. `ragno` is Italian for
# spider. For pictures of other things, `--folder_to_label folders` takes the folders' own names; or write them here.
FOLDER_TO_LABEL = {
    "butterfly": "butterfly",
    "cat": "cat",
    "chicken": "chicken",
    "cow": "cow",
    "dog": "dog",
    "elephant": "elephant",
    "horse": "horse",
    "ragno": "spider",
    "sheep": "sheep",
    "squirrel": "squirrel",
}

PROMPT = "What animal is in this picture? Answer with one of these words: {labels}."
ANSWER = "{label}"

# Pictures outside these limits are refused before they are decoded, in training, validation and test alike.
MAX_PIXELS = 64_000_000  # width x height: 8000 x 8000, or 192 MB of RGB. A 50-megapixel photo from a phone is accepted
MAX_BYTES = 1 << 29  # size of a file. A picture of MAX_PIXELS is smaller, even as an uncompressed 16-bit TIFF
MIN_SIDE = 8  # pixels. Smaller pictures (tracking pixels, broken downloads) show no animal

# Beside these columns predictions.csv has one for each label.
CSV_COLUMNS = ("image", "label", "prediction", "probability", "correct", "sha256", "group", "labels_mass", "error")
CSV_COLUMNS += ("checkpoint", "unsure", "top2", "top2_probability", "top3", "top3_probability")
MAX_LABELS = 5000  # of a task; all of them are scored in one sequence
MAX_TEXT = 10_000  # characters of --prompt and of --answer
HALF_LETTER = re.compile("[\ud800-\udfff]")  # of JSON, or of a command line that is no UTF-8; no model reads it

# LLaVA-1.6-Mistral's own chat format for one turn, with two things that the template on the hub lacks: BOS (the
# processor adds it at inference, TRL's collator does not) and the generation markers that say which tokens are learned.
CHAT_TEMPLATE = (
    "{{ '<s>' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ ' [/INST]' }}"
    "{% else %}"
    "{% generation %}{{ ' ' + message['content'][0]['text'] + '</s>' }}{% endgeneration %}"
    "{% endif %}{% endfor %}"
)

# What train.py uses for a flag that is not given, where we want another value than the libraries' own.
TRAINING_DEFAULTS = {
    "model_name_or_path": "model",  # a folder with the files of the hub's repository
    "output_dir": "sft-llava-1.6-7b",
    "dtype": "bfloat16",  # the type of the loaded weights; TRL's own default is float32
    "bf16": True,
    "max_length": None,  # a picture has 1,032 to 2,928 image tokens: any cut would lose the picture or the answer
    "assistant_only_loss": True,  # learn the answer and </s>, never image, prompt or padding tokens
    "remove_unused_columns": False,  # keep the column `image_tokens`: batch_rebalance and group_by_length sort by it
    "length_column_name": "image_tokens",
    "report_to": ["tensorboard"],
}


def locale_language() -> str:
    """The default of --language: `zh` if the environment's locale is Chinese, else `en`."""
    locale = next(filter(None, map(os.environ.get, ("LC_ALL", "LC_MESSAGES", "LANG"))), "")
    return "zh" if locale.startswith("zh") else "en"


def setting(default, text):
    """A field of Config: its default, and the text that `--help` shows for it."""
    return field(default=default, metadata={"help": text})


# Groups of fields that several scripts offer as flags.
TASK_FIELDS = ("prompt", "answer", "folder_to_label")
DATA_FIELDS = ("input_dir", "temp_dir", *TASK_FIELDS, "max_excluded", "near_duplicate_distance", "near_duplicate_limit")
DATA_FIELDS += ("allow_leaks", "data_processes")
TRAINING_FIELDS = ("logging_dir", "eval_pictures", "examples_per_class", "train_parts", "early_stopping_patience")
TRAINING_FIELDS += ("class_weights", "max_hours")
RATE = "None: that of --learning_rate"
NONE = "None: what the checkpoint was trained with, else the default in config.py"


@dataclass
class Config:
    input_dir: str = setting("input", "folder with train_data/ and validation_data/; in each, one folder per class")
    temp_dir: str = setting("temp", "folder for the caches; it may be deleted at any time")
    logging_dir: str = setting("logs", "folder for TensorBoard's events; each run gets a subfolder")
    eval_pictures: int = setting(500, "held-out pictures that evaluation while training measures; 0 = all of them")
    prompt: str | None = setting(None, "the question; {labels} becomes the list of labels. " + NONE)
    answer: str | None = setting(None, "the text to learn; {label} becomes the picture's label. " + NONE)
    folder_to_label: dict | str | None = setting(
        None, "class folder -> label, as JSON, or the word `folders`: each folder's name is its label. " + NONE
    )
    max_excluded: float = setting(0.01, "largest share of a split's pictures that may be unusable, from 0 to 1")
    near_duplicate_distance: int = setting(8, "near-duplicates' hashes differ in at most so many of 64 bits; 0 to 16")
    near_duplicate_limit: int = setting(200_000, "with more pictures than this, near-duplicates are not searched")
    allow_leaks: bool = setting(False, "continue although identical pictures are in both splits or under two labels")
    data_processes: int = setting(0, "number of processes that decode pictures for the cache; 0 = one per CPU core")
    examples_per_class: int | None = setting(None, "training pictures per class, which --seed chooses; None: all")
    train_parts: str | None = setting(
        None, "what trains: some of vision,projector,language; or attention for language. None: all; with LoRA adapters"
    )
    vision_learning_rate: float | None = setting(None, "highest learning rate of the vision tower. " + RATE)
    projector_learning_rate: float | None = setting(None, "highest learning rate of the projector. " + RATE)
    class_weights: str | None = setting(None, "balanced: all classes have the same share of the loss, also small ones")
    early_stopping_patience: int | None = setting(None, "end after this number of evaluations without a better one")
    max_hours: float | None = setting(None, "hours after which the run saves its model and ends; it can be continued")
    language: str = setting(locale_language(), "language of the pages: en or zh")

    chat_template: str = field(default=CHAT_TEMPLATE, init=False)  # no flag: the checkpoint's own, else this one

    def __post_init__(self):
        defaults = {"folder_to_label": FOLDER_TO_LABEL, "prompt": PROMPT, "answer": ANSWER}
        self.given = {name for name in defaults if getattr(self, name) is not None}  # these win over the checkpoint's
        for name in defaults.keys() - self.given:
            setattr(self, name, defaults[name])
        self.folder_to_label = read_table(self.folder_to_label, self.input_dir)
        problems = task_problems(self.prompt, self.answer, self.folder_to_label)
        if self.language not in ("en", "zh"):
            problems.append(f"language: found {self.language}; expected en or zh")
        if self.class_weights not in (None, "balanced"):
            problems.append(f"class_weights: found {self.class_weights}; expected balanced, or no such flag")
        Findings([*range_problems(vars(self)), *(f"--{line}" for line in problems)]).report()

    @property
    def labels(self) -> list[str]:
        """The distinct labels, in the table's order. The index of a label is its class number everywhere."""
        return list(dict.fromkeys(self.folder_to_label.values()))

    @property
    def question(self) -> str:
        """The prompt of training, validation and test: the user's turn, without the picture."""
        return self.prompt.replace("{labels}", ", ".join(self.labels))

    def answer_for(self, label: str) -> str:
        return self.answer.replace("{label}", label)

    def conversation(self, label=None) -> list[dict]:
        """The chat about one picture, in the format of TRL and Hugging Face; without a label, only the question."""
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": self.question}]}]
        if label is not None:
            chat.append({"role": "assistant", "content": [{"type": "text", "text": self.answer_for(label)}]})
        return chat


def read_table(table: dict | str, input_dir: str) -> dict[str, str]:
    """class folder -> label, from a dict, its JSON, or `folders`: those of train_data, else of validation_data."""
    if table == "folders":
        splits = [os.path.join(input_dir, name) for name in ("train_data", "validation_data")]
        split = next((split for split in splits if os.path.isdir(split) and subfolders(split)), None)
        if not split:
            found = f"found no folder in {' or '.join(splits)}{deeper(input_dir)}; expected one folder per class"
            raise UserError(f"--folder_to_label folders: {found}; put them there, or name another --input_dir")
        table = {name: name for name in subfolders(split)}
        if strange := [name for name in table if printable(name) != name]:
            raise UserError(f"{split}: found a class folder {strange[0]!r}; expected no control characters; rename it")
        if len(table) == 1 and (inside := subfolders(os.path.join(split, *table))):
            found = f"found one folder in {split}, {', '.join(table)}, and folders in it ({', '.join(inside[:4])})"
            expected = f"expected the class folders in {split} itself; move them there"
            raise UserError(f"--folder_to_label folders: {found}; {expected}")
    if isinstance(table, str):
        with contextlib.suppress(ValueError, RecursionError):  # no JSON: refused in the next lines
            table = json.loads(table)
    return dict(table) if isinstance(table, dict) else table  # task_problems() judges it


def task_problems(prompt, answer, table) -> list[str]:
    """What cannot be asked or answered, a line each, which begins with the setting's name. For flags and task.json."""
    problems = []
    if not (isinstance(table, dict) and 0 < len(table) <= MAX_LABELS and all(map(is_label, table.values()))):
        problems.append(
            f'folder_to_label: found {reprlib.repr(table)}; expected JSON like {{"ragno": "spider"}}, or the word '
            f"folders; at most {MAX_LABELS:,} labels of 1 to 100 printable characters, none of them like a column of "
            f"the CSV files ({', '.join(CSV_COLUMNS)})"
        )
    for name, text, part in (("prompt", prompt, ""), ("answer", answer, "{label}")):
        if not isinstance(text, str) or part not in text or len(text) > MAX_TEXT or HALF_LETTER.search(text):
            expected = f"a text of at most {MAX_TEXT:,} characters" + f" that contains {part}" * bool(part)
            problems.append(f"{name}: found {reprlib.repr(text)}; expected {expected}")
    if not problems:
        listed = sum(len(label) + 2 for label in {*table.values()})
        if (n := len(prompt) + prompt.count("{labels}") * listed) > 10 * MAX_TEXT:
            problems.append(f"prompt: found {n:,} characters with the labels in it; expected at most {10 * MAX_TEXT:,}")
    return problems


def is_label(value) -> bool:
    """Whether this can be a label. Two invisible characters, which join letters or not, are part of some scripts."""
    text = value.translate({0x200C: None, 0x200D: None}) if isinstance(value, str) else ""
    return 0 < len(text) <= 100 and text.isprintable() and value not in CSV_COLUMNS


def parser(description: str, names) -> Parser:
    """A parser with a flag for each of the named fields of Config."""
    result = Parser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_flags(result, names)
    return result


def add_flags(parser: argparse.ArgumentParser, names) -> None:
    group = parser.add_argument_group("settings (config.py)")
    for f in fields(Config):
        if f.name in names:
            kind = {int: int, int | None: int, float: float, float | None: float, bool: yes_or_no}.get(f.type, str)
            bare = {"nargs": "?", "const": True} if f.type is bool else {}  # --allow_leaks alone means True
            group.add_argument(f"--{f.name}", type=kind, default=f.default, help=f.metadata["help"], **bare)


def config_from(args: argparse.Namespace) -> Config:
    """The Config that parsed arguments describe; a field that they lack keeps its default."""
    return Config(**{f.name: getattr(args, f.name) for f in fields(Config) if f.init and hasattr(args, f.name)})
