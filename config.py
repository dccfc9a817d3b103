"""Settings of the whole project, in one place. Standard library only, so every script may import it at once.

Each field of `Config` is also a flag of every script. What wins: config.py < *.sh < the command line.
Training hyper-parameters stand in train.sh, one flag a line; what they default to when train.py is run bare is
`TRAINING_DEFAULTS` below.
"""

import argparse
import json
from dataclasses import dataclass, field, fields

from animals.command import UserError, yes_or_no

# Folder name -> the word the model answers. Order is the order of the labels everywhere. `ragno` is Italian for spider.
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


def setting(default, text):
    """A field of Config: its default and the line `--help` shows for it."""
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    input_dir: str = setting("input", "folder with train_data/ and validation_data/, one folder a class in each")
    temp_dir: str = setting("temp", "folder for the caches; may be deleted at any time")
    logging_dir: str = setting("logs", "folder for TensorBoard's events, a subfolder a run")
    eval_pictures: int = setting(500, "held-out pictures that training measures itself on, stratified; 0 = all")
    prompt: str = setting(
        "What animal is in this picture? Answer with one of these words: {labels}.",
        "the question; {labels} becomes the list of labels",
    )
    answer: str = setting("{label}", "the answer that is learned; {label} becomes the picture's label")
    folder_to_label: dict | str | None = setting(FOLDER_TO_LABEL, "class folder -> label, as a JSON object")
    max_excluded: float = setting(0.01, "share of a split that may be unusable pictures; more is an error")
    near_duplicate_distance: int = setting(
        8, "bits of 64 that perceptual hashes of look-alikes differ in at most; 0 to 16, even: distances are"
    )
    look_alike_limit: int = setting(
        200_000, "look-alikes are searched among so many pictures at most; twice as many take four times as long"
    )
    allow_leaks: bool = setting(False, "go on although identical pictures are in both splits or under two labels")
    data_processes: int = setting(0, "processes that decode pictures when the cache is built; 0 = one a core")

    def __post_init__(self):
        if isinstance(self.folder_to_label, str):
            try:
                self.folder_to_label = json.loads(self.folder_to_label)
            except ValueError as error:
                raise UserError(f'--folder_to_label: {error}; expected JSON like {{"ragno": "spider"}}') from None
        if not 0 <= self.max_excluded <= 1:
            raise UserError(f"--max_excluded: found {self.max_excluded}; expected a share from 0 to 1")
        if not 0 <= self.near_duplicate_distance <= 16:
            raise UserError(f"--near_duplicate_distance: found {self.near_duplicate_distance}; expected 0 to 16 bits")
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


def parser(description: str) -> argparse.ArgumentParser:
    """A strict parser (no shortened flags) that already has every setting of Config as a flag."""
    result = argparse.ArgumentParser(
        description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    group = result.add_argument_group("settings (config.py)")
    for f in fields(Config):
        kind = {int: int, float: float, bool: yes_or_no}.get(f.type, str)
        default = json.dumps(f.default_factory()) if callable(f.default_factory) else f.default
        bare = {"nargs": "?", "const": True} if f.type is bool else {}  # --allow_leaks alone means True
        text = f.metadata["help"].replace("%", "%%")
        group.add_argument(f"--{f.name}", type=kind, default=default, help=text, **bare)
    return result


def take(args: argparse.Namespace) -> Config:
    """The Config within parsed arguments."""
    return Config(**{f.name: getattr(args, f.name) for f in fields(Config)})
