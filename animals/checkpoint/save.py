"""Write a checkpoint folder as the hub repository has it: its file names and settings, for transformers 4.46 to 5."""

import os
import shutil

from animals.checkpoint.check import base_of
from animals.files import read_json, write_json

SHARD_SIZE = "5GB"  # the hub's; transformers 5 would write 15 GB in one file


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)

HUB_TEMPLATE = (  # for a copy that has no chat template: the hub's, without BOS, with a space after </s>
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ '<<SYS>>\n' + message['content'][0]['text'] + "
    "'\n<</SYS>>\n\n' }}{% elif message['role'] == 'user' %}{{ '[INST] ' }}{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{# Render all text next #}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] }}{% endfor %}{{' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'][0]['text'] + '</s> '}}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)


def write_hub_files(folder, source, processor):
    """Make of what transformers 5 saved in `folder` what the hub repository holds. Main process only.

    `source` is the folder the model was loaded from: its tokenizer files, which training does not change, are copied.
    Both spellings of each setting are written, for readers before and after transformers 5.
    """
    source = base_of(source)
    for name in TOKENIZER_FILES:
        if os.path.isfile(os.path.join(source, name)):
            shutil.copyfile(os.path.join(source, name), os.path.join(folder, name))
    write_tokenizer_settings(folder, processor)
    nested = read_json(os.path.join(folder, "processor_config.json"))
    pixels = nested.pop("image_processor") | {"processor_class": nested["processor_class"]}
    write_json(os.path.join(folder, "preprocessor_config.json"), dict(sorted(pixels.items())))
    write_json(os.path.join(folder, "processor_config.json"), nested)  # transformers 4.50 stops at a nested one
    write_json(os.path.join(folder, "chat_template.json"), {"chat_template": processor.chat_template})
    file = os.path.join(folder, "config.json")
    if os.path.isfile(file):  # an adapter has none
        config = read_json(file)
        for part in (config, config["text_config"], config["vision_config"]):
            if "dtype" in part:
                part["torch_dtype"] = part["dtype"]
        config["text_config"]["rope_theta"] = config["text_config"]["rope_parameters"]["rope_theta"]
        config.pop("use_cache", None)  # was off for training only
        write_json(file, config)


def write_tokenizer_settings(folder, processor):
    """tokenizer_config.json, special_tokens_map.json and added_tokens.json that readers of transformers 4 take."""
    tokenizer = processor.tokenizer
    file = os.path.join(folder, "tokenizer_config.json")
    config = read_json(file)
    if config.get("tokenizer_class") != "LlamaTokenizer":  # transformers 5 writes its own TokenizersBackend
        for name in ("backend", "is_local", "local_files_only"):
            config.pop(name, None)
        special = config.pop("model_specific_special_tokens", None) or {"image_token": processor.image_token}
        config |= {"tokenizer_class": "LlamaTokenizer", "extra_special_tokens": special, "legacy": True}
        write_json(file, config)
    if "added_tokens_decoder" not in config:
        config["added_tokens_decoder"] = {
            str(i): {key: getattr(token, key) for key in ("content", "lstrip", "normalized", "rstrip", "single_word")}
            | {"special": True}
            for i, token in sorted(tokenizer.added_tokens_decoder.items())
        }
        write_json(file, config)
    map_file, added_file = (os.path.join(folder, name) for name in ("special_tokens_map.json", "added_tokens.json"))
    if not os.path.isfile(map_file):
        flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        write_json(map_file, {name: {"content": getattr(tokenizer, name)} | flags for name in names})
    if not os.path.isfile(added_file):
        core = {"<unk>", "<s>", "</s>"}
        added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.content not in core}
        write_json(added_file, added)
