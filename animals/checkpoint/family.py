"""The two kinds of model that this project accepts, and their classes and files. The prompt: config.CHAT_TEMPLATE.

LLaVA-NeXT on Mistral (model_type "llava_next", the hub's) sees a picture in tiles. Plain LLaVA on Mistral (model_type
"llava", made by scripts/whole_view.py) sees the whole view alone: the picture squeezed into one tile.
"""

import os
import re

from animals.command import UserError
from config import CHAT_TEMPLATE

HUB_NAME = "llava-hf/llava-v1.6-mistral-7b-hf"

# The hub's chat template: ours without BOS, which its readers add themselves, and without the marks of the answer.
HUB_TEMPLATE = re.sub(r"\{\{ '<s>' \}\}|\{% (end)?generation %\}", "", CHAT_TEMPLATE)

PROCESSORS = {"llava_next": "LlavaNextProcessor", "llava": "LlavaProcessor"}  # of each accepted model_type


def fetch(path, name=""):
    """The command that downloads one file of the hub's checkpoint, or all of them, into the folder `path`."""
    return f"`hf download {HUB_NAME}{' ' + name if name else ''} --local-dir {path}`"


def family_problem(values: dict, path) -> str | None:
    """Why we cannot use a model with this config.json, in one line; None if we can.

    The copies of LLaVA on Vicuna have the same model_type, but another language model, `llama` (transformers' default
    as well), which was trained with another prompt.
    """
    kind, text = values.get("model_type"), (values.get("text_config") or {}).get("model_type", "llama")
    if kind not in PROCESSORS:
        return f"{path}: found model_type {kind!r} in config.json; expected 'llava_next' or 'llava': {fetch(path)}"
    if text != "mistral":
        return (
            f"{path}: found the language model {text!r} in config.json (text_config.model_type; Vicuna is a 'llama'); "
            f"expected 'mistral', because the prompt is Mistral's: {fetch(path)}"
        )
    if "quantization_config" in values:
        return (
            f"{path}: found a quantized copy (quantization_config in config.json); expected the plain weights: "
            f"{fetch(path)}; --load_in_4bit quantizes them as they load"
        )
    return None


def model_config(path):
    """transformers' config of a checkpoint folder, or of a config.json file."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(os.fspath(path))


def model_class(config):
    """transformers' class of the model that `config` describes."""
    from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

    return LlavaForConditionalGeneration if config.model_type == "llava" else LlavaNextForConditionalGeneration


def check_tokenizer(tokenizer, path):
    """Raises UserError unless <image> is one token and the ▁ after it stays, which some rebuilt tokenizers drop."""
    tokens = tokenizer.tokenize("<image>\nx")
    if tokens[:2] != ["<image>", "▁"]:
        files = "tokenizer.json tokenizer_config.json added_tokens.json"
        raise UserError(
            f"{path}: its tokenizer cuts '<image>' and a new line into {tokens}; expected '<image>', '▁', ... as the "
            f"model was trained on; download the tokenizer again: {fetch(path, files)}"
        )
