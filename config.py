"""Settings of the whole project, in one place. Standard library only, so every script may import it at once.

Each field of `Config` is also a flag of every script. What wins: config.py < what the checkpoint was trained with
(its task.json: labels, question, answer, chat format) < *.sh < the command line.
Training hyper-parameters stand in train.sh, one flag a line; what they default to when train.py is run bare is
`TRAINING_DEFAULTS` below.
"""

import argparse
import json
import os
from dataclasses import dataclass, field, fields

from animals.command import UserError, yes_or_no
from animals.files import subfolders

# Folder name -> the word the model answers. Order is the order of the labels everywhere. `ragno` is Italian for spider.
# For pictures of other things `--folder_to_label folders` takes the folders' own names, or write them here.
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

# How a page in Chinese calls a label; one that is not here stands there as it is. The model never sees these.
LABELS_IN_CHINESE = {
    "butterfly": "蝴蝶",
    "cat": "猫",
    "chicken": "鸡",
    "cow": "牛",
    "dog": "狗",
    "elephant": "大象",
    "horse": "马",
    "spider": "蜘蛛",
    "sheep": "羊",
    "squirrel": "松鼠",
}

PROMPT = "What animal is in this picture? Answer with one of these words: {labels}."
ANSWER = "{label}"
VIEWS = ("tiles", "whole")
IMAGE_VIEW = VIEWS[0]

# Pictures beyond these are refused before they are decoded, in training, validation and test alike.
MAX_PIXELS = 64_000_000  # width x height; 8000 x 8000; 192 MB of RGB; a 50-megapixel phone picture passes
MAX_BYTES = 1 << 29  # of a file; a picture that passes MAX_PIXELS fits, even as uncompressed 16-bit TIFF
MIN_SIDE = 8  # pixels; smaller ones (tracking pixels, broken downloads) show no animal

# LLaVA-1.6-Mistral's own chat format, one turn, with what its hub template lacks: BOS (the processor adds it at
# inference, TRL's collator does not) and the generation markers that say which tokens are learned.
CHAT_TEMPLATE = (
    "{{ '<s>' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "{{ '[INST] ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ ' [/INST]' }}"
    "{% else %}"
    "{% generation %}{{ ' ' + message['content'][0]['text'] + '</s>' }}{% endgeneration %}"
    "{% endif %}"
    "{% endfor %}"
)

# What train.py uses for a flag that neither train.sh nor the command line gives; the rest are the libraries' defaults.
TRAINING_DEFAULTS = {
    "model_name_or_path": "model",  # folder with the hub repository's files
    "output_dir": "sft-llava-1.6-7b",
    "dtype": "bfloat16",  # of the loaded weights; TRL's own default is float32
    "bf16": True,
    "max_length": None,  # 1,032 to 2,928 image tokens a picture: any cut loses the picture or the answer
    "assistant_only_loss": True,  # learn the answer and </s>; never image, prompt or padding tokens
    "remove_unused_columns": False,  # keep `image_tokens`, which batch_rebalance and group_by_length sort by
    "length_column_name": "image_tokens",
    "report_to": "tensorboard",
}


def locale_language() -> str:
    """`zh` in a Chinese environment, else `en`: the language of the pages unless --language says otherwise."""
    locale = next(filter(None, map(os.environ.get, ("LC_ALL", "LC_MESSAGES", "LANG"))), "")
    return "zh" if locale.startswith("zh") else "en"


def setting(default, text):
    """A field of Config: its default and the line `--help` shows for it."""
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    input_dir: str = setting("input", "folder with train_data/ and validation_data/, one folder a class in each")
    temp_dir: str = setting("temp", "folder for the caches; may be deleted at any time")
    logging_dir: str = setting("logs", "folder for TensorBoard's events, a subfolder a run")
    eval_pictures: int = setting(500, "held-out pictures that training measures itself on, stratified; 0 = all")
    # None, the three of them: what the checkpoint was trained with, else PROMPT, ANSWER and FOLDER_TO_LABEL
    prompt: str | None = setting(
        None, "the question; {labels} becomes the list of labels. None: the checkpoint's, else PROMPT"
    )
    answer: str | None = setting(None, "what is learned; {label} becomes the picture's label. None: as --prompt")
    folder_to_label: dict | str | None = setting(
        None, "class folder -> label, as a JSON object; `folders`: their own names. None: as --prompt"
    )
    image_view: str | None = setting(
        None,
        "tiles: the picture whole and in tiles beside it, 1,032 to 2,928 tokens; whole: 336x336 pixels, 576 tokens. "
        "None: as --prompt",
    )
    max_excluded: float = setting(0.01, "share of a split that may be unusable pictures; more is an error")
    near_duplicate_distance: int = setting(
        8, "bits of 64 that perceptual hashes of look-alikes differ in at most; 0 to 16, even: distances are"
    )
    look_alike_limit: int = setting(
        200_000, "look-alikes are searched among so many pictures at most; twice as many take four times as long"
    )
    allow_leaks: bool = setting(False, "go on although identical pictures are in both splits or under two labels")
    data_processes: int = setting(0, "processes that decode pictures when the cache is built; 0 = one a core")
    train_parts: str = setting(
        "vision,projector,language",
        "which parts of the model training changes; the others are frozen (training/parts.py)",
    )
    language: str = setting(locale_language(), "of the pages (report, contact sheet, audit, --serve): en or zh")

    chat_template: str = field(default=CHAT_TEMPLATE, init=False)  # no flag: the checkpoint's, else the one above

    def __post_init__(self):
        words = {"folder_to_label": FOLDER_TO_LABEL, "prompt": PROMPT, "answer": ANSWER, "image_view": IMAGE_VIEW}
        self.given = {name for name in words if getattr(self, name) is not None}  # these win over the checkpoint's
        for name in words.keys() - self.given:
            setattr(self, name, words[name])
        self.folder_to_label = read_table(self.folder_to_label, self.input_dir)
        if not 0 <= self.max_excluded <= 1:
            raise UserError(f"--max_excluded: found {self.max_excluded}; expected a share from 0 to 1")
        if not 0 <= self.near_duplicate_distance <= 16:
            raise UserError(f"--near_duplicate_distance: found {self.near_duplicate_distance}; expected 0 to 16 bits")
        if self.image_view not in VIEWS:
            raise UserError(f"--image_view: found {self.image_view}; expected {' or '.join(VIEWS)}")
        if self.language not in ("en", "zh"):
            raise UserError(f"--language: found {self.language}; expected en or zh")
        if "{label}" not in self.answer:
            raise UserError(f"--answer: found {self.answer!r}; expected a text that contains {{label}}")

    @property
    def labels(self) -> list[str]:
        """The distinct labels, in the table's order; the index of a label is its class number everywhere."""
        return list(dict.fromkeys(self.folder_to_label.values()))

    @property
    def question(self) -> str:
        """The one prompt of training, validation and test (the user's turn, without the picture)."""
        return self.prompt.replace("{labels}", ", ".join(self.labels))

    def answer_for(self, label: str) -> str:
        """The assistant's turn for a label."""
        return self.answer.replace("{label}", label)

    def conversation(self, label=None) -> list[dict]:
        """The chat about a picture, as TRL and all Hugging Face tools read it; without a label the question alone."""
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": self.question}]}]
        if label is not None:
            chat.append({"role": "assistant", "content": [{"type": "text", "text": self.answer_for(label)}]})
        return chat


def read_table(table: dict | str, input_dir: str) -> dict[str, str]:
    """class folder -> label, of a dict, of its JSON, or of `folders`: those of train_data, else of validation_data."""
    if table == "folders":
        splits = [os.path.join(input_dir, name) for name in ("train_data", "validation_data")]
        names = next(filter(None, (subfolders(split) for split in splits if os.path.isdir(split))), [])
        if not names:
            raise UserError(
                f"--folder_to_label folders: found no folder in {' or '.join(splits)}; expected one of pictures a "
                "class; put them there, or name another --input_dir"
            )
        return {name: name for name in names}
    try:
        table = json.loads(table) if isinstance(table, str) else dict(table)
    except ValueError as error:
        raise UserError(
            f'--folder_to_label: {error}; expected JSON like {{"ragno": "spider"}}, or the word folders'
        ) from None
    if not isinstance(table, dict) or not table or not all(v and isinstance(v, str) for v in table.values()):
        raise UserError(f'--folder_to_label: found {table!r}; expected JSON like {{"ragno": "spider"}}')
    return table


def flags():
    """The fields of Config that are flags."""
    return [f for f in fields(Config) if f.init]


def parser(description: str) -> argparse.ArgumentParser:
    """A strict parser (no shortened flags) that already has every setting of Config as a flag."""
    result = argparse.ArgumentParser(
        description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    group = result.add_argument_group("settings (config.py)")
    for f in flags():
        kind = {int: int, float: float, bool: yes_or_no}.get(f.type, str)
        bare = {"nargs": "?", "const": True} if f.type is bool else {}  # --allow_leaks alone means True
        group.add_argument(f"--{f.name}", type=kind, default=f.default, help=f.metadata["help"], **bare)
    return result


def take(args: argparse.Namespace) -> Config:
    """The Config within parsed arguments."""
    return Config(**{f.name: getattr(args, f.name) for f in flags()})
