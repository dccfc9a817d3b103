"""The two kinds of model that this project accepts: their classes, their settings files and what may stand in these.

LLaVA-NeXT on Mistral (model_type "llava_next", the hub's) sees a picture in tiles. Plain LLaVA on Mistral (model_type
"llava", made by scripts/whole_view.py) sees the whole view alone: the picture squeezed into one tile.
"""

import contextlib
import os
import re
import reprlib

from animals.command import UserError
from animals.files import read_json
from config import CHAT_TEMPLATE

HUB_NAME = "llava-hf/llava-v1.6-mistral-7b-hf"

# The hub's chat template: ours without BOS, which its readers add themselves, and without the marks of the answer.
HUB_TEMPLATE = re.sub(r"\{\{ '<s>' \}\}|\{% (end)?generation %\}", "", CHAT_TEMPLATE)

PROCESSORS = {"llava_next": "LlavaNextProcessor", "llava": "LlavaProcessor"}  # of each accepted model_type


# What may stand in a checkpoint's JSON files, as far as we or the libraries compute with it. (type, lowest, highest): a
# number, or a text or a list by its length; a fourth value says what the elements of the list are. {name: kind}: an
# object, "*" for all of its names. {word, ...}: one of these words. A pattern: a text that it matches. [kind, ...]: one
# of these kinds. What is null or has another name is not looked at.
NAME, SIDE, LAYER = (str, 1, 100), (int, 1, 10_000), (int, -1000, 1000)
SHARD, MODULE = re.compile(r"[^/\x00-\x1f]{1,200}\.safetensors"), re.compile(r"[\w.]{1,100}")
GRID = (list, 1, 200, (list, 2, 2, SIDE))
SIZE = [SIDE, {"shortest_edge": SIDE, "height": SIDE, "width": SIDE}]
VIEW = {"vision_feature_select_strategy": {"default", "full"}}
PIXELS = {
    "size": SIZE, "crop_size": SIZE, "image_grid_pinpoints": GRID, "resample": (int, 0, 5),
    "image_mean": (list, 3, 3, (float, -255, 255)), "image_std": (list, 3, 3, (float, 1e-6, 255)),
    "rescale_factor": (float, 1e-9, 1e3),
}  # fmt: skip
PART = {
    "model_type": NAME, "num_hidden_layers": (int, 1, 1000), "num_labels": (int, 0, 10_000),
    "hidden_size": (int, 1, 100_000), "intermediate_size": (int, 1, 1_000_000), "vocab_size": (int, 1, 10_000_000),
    "num_attention_heads": SIDE, "num_key_value_heads": SIDE, "image_size": SIDE, "patch_size": SIDE,
    "rms_norm_eps": (float, 0, 1), "layer_norm_eps": (float, 0, 1), "attention_dropout": (float, 0, 1),
}  # fmt: skip
SCHEMA = {
    "config.json": VIEW | {
        "model_type": NAME, "num_labels": PART["num_labels"], "text_config": PART, "vision_config": PART,
        "image_grid_pinpoints": GRID, "vision_feature_layer": [LAYER, (list, 1, 100, LAYER)],
    },
    "preprocessor_config.json": PIXELS,
    "processor_config.json": VIEW | {
        "image_processor": PIXELS, "patch_size": SIDE, "num_additional_image_tokens": (int, 0, 100),
    },
    "model.safetensors.index.json": {"metadata": {}, "weight_map": {"*": SHARD}},
    "tokenizer_config.json": {}, "chat_template.json": {"chat_template": (str, 0, 100_000)},
    "adapter_config.json": {
        "peft_type": {"LORA"}, "base_model_name_or_path": (str, 1, 4096), "r": (int, 1, 10_000),
        "target_modules": [(str, 1, 1000), (list, 1, 1000, MODULE)], "modules_to_save": (list, 1, 100, MODULE),
        "target_parameters": (list, 1, 1000, MODULE),
        "init_lora_weights": [(bool, 0, 1), {"gaussian", "olora", "orthogonal", "pissa"}],
    },
    "chosen.json": {"step": (int, 1, 10**9), "pictures": (list, 1, 10**6, (str, 64, 64))},
}  # fmt: skip


def read_settings(folder, name) -> dict | None:
    """The content of a file of SCHEMA in `folder`, None if there is none. Raises UserError, a line for each mistake."""
    file = os.path.join(folder, name)
    return check_settings(file, name) if os.path.exists(file) else None


def check_settings(file, name) -> dict:
    """As read_settings(), for a file that is there, whatever its own name."""
    values = read_json(file)
    if problems := mistakes(values, SCHEMA[name], ""):
        folder = os.path.dirname(file)
        ours = name in ("adapter_config.json", "chosen.json")
        do = "copy it from its run again" if ours else f"restore it: {fetch(folder, name)}"
        raise UserError("\n".join(f"{file}: found {line}; {do}" for line in problems))
    return values


def mistakes(value, kind, place) -> list[str]:
    """A line for each value that is not of its kind: where it stands, what it is, what is expected."""
    if isinstance(kind, list):
        return min((mistakes(value, one, place) for one in kind), key=len)
    if isinstance(kind, dict):
        if isinstance(value, dict):
            if "*" in kind:
                kind = dict.fromkeys(value, kind["*"])
            inside = {f"{place}.{name}".removeprefix("."): name for name in kind if value.get(name) is not None}
            return [line for where, name in inside.items() for line in mistakes(value[name], kind[name], where)][:5]
        right, expected = False, "an object"
    elif isinstance(kind, set):
        right, expected = value in [*kind], " or ".join(sorted(kind))
    elif isinstance(kind, re.Pattern):
        right, expected = isinstance(value, str) and kind.fullmatch(value), f"a name such as {kind.pattern}"
    else:
        (wanted, low, high), element = kind[:3], kind[3:]
        number = wanted in (int, float, bool)
        right = type(value) is wanted or (wanted is float and type(value) is int)
        right = right and low <= (value if number else len(value)) <= high
        if right and element:  # of a wrong list the first mistake says enough
            return [line for part in value for line in mistakes(part, *element, place)][:1]
        noun = {int: "a whole number", str: "a text of length", list: "a list of length"}.get(wanted, "a number")
        expected = f"{noun} from {low:,} to {high:,}"
    return [] if right else [f"{place} {reprlib.repr(value)}; expected {expected}"]


def fetch(path, name=""):
    """The command that downloads one file of the hub's checkpoint, or all of them, into the folder `path`."""
    return f"`hf download {HUB_NAME}{' ' + name if name else ''} --local-dir {path}`"


def check_family(values: dict, path):
    """Raises UserError unless we can use a model with this config.json.

    The copies of LLaVA on Vicuna have the same model_type, but another language model, `llama` (transformers' default
    as well), which was trained with another prompt.
    """
    kind, text = values.get("model_type"), (values.get("text_config") or {}).get("model_type", "llama")
    vision, seen = values.get("vision_config") or {}, values.get("vision_feature_layer") or -2
    layers, seen = vision.get("num_hidden_layers", 1000), seen if isinstance(seen, list) else [seen]
    plain = "the plain weights, which --load_in_4bit quantizes as they load"
    mistral = "'mistral', because the prompt is Mistral's"
    for wrong, found, expected in (
        (kind not in PROCESSORS, f"model_type {kind!r}", "'llava_next' or 'llava'"),
        (text != "mistral", f"the language model {text!r} (text_config.model_type; Vicuna is a 'llama')", mistral),
        (not vision, "no vision_config", "that of a CLIP"),
        (not all(-layers - 1 <= n <= layers for n in seen), f"vision_feature_layer {seen}", f"one of {layers}"),
        ("quantization_config" in values, "a quantized copy (quantization_config)", plain),
    ):
        if wrong:
            raise UserError(f"{path}: found {found} in config.json; expected {expected}: {fetch(path)}")


def model_config(path):
    """transformers' config of a checkpoint folder, or of a config.json file. Raises UserError for what it refuses."""
    file = os.path.join(path, "config.json") if os.path.isdir(path) else os.fspath(path)
    check_family(check_settings(file, "config.json"), os.path.dirname(file))
    from transformers import AutoConfig

    with in_one_line(file):
        return AutoConfig.from_pretrained(os.fspath(path), trust_remote_code=False)


@contextlib.contextmanager
def in_one_line(path):
    """with in_one_line(path): what transformers, tokenizers and peft raise on a damaged file becomes a UserError."""
    try:
        yield
    except Exception as error:  # tokenizers raises bare Exceptions
        said = (str(error).splitlines() or [""])[0][:300]
        raise UserError(
            f"{path}: cannot be read: found {type(error).__name__} ({said}); expected the files of the hub's "
            f"repository; download all of them again except the weights: {fetch(path)}"
        ) from None


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
