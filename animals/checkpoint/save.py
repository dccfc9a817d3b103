"""Complete a saved folder: weights by training, all else as the source folder has it, and what it was trained on."""

import os
import shutil

from animals.checkpoint.check import base_of
from animals.checkpoint.task import write_task
from animals.checkpoint.view import write_whole_files
from animals.files import read_json, write_json

SHARD_SIZE = "5GB"  # the hub's; transformers 5 would write 15 GB in one file

# Training changes weights only. Copied by name, because a source may hold checkpoint-N, .bin, .cache and *.py as well.
COPIED = (
    "added_tokens.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
)


def complete(folder, source, processor, task, dtype=None):
    """Put beside the weights in `folder` what makes it a checkpoint like the one in `source`. Main process only.

    source: where the model was loaded from; of an adapter, its base counts. processor: its processor, as
    load_processor() mended it. task: task.json's content, or None for a checkpoint that nobody trained. dtype:
    of the saved weights; None: as config.json says.
    """
    source = base_of(source)
    for name in COPIED:
        if os.path.isfile(os.path.join(source, name)):
            shutil.copyfile(os.path.join(source, name), os.path.join(folder, name))
    write_json(os.path.join(folder, "chat_template.json"), {"chat_template": processor.chat_template})
    if not os.path.isfile(os.path.join(folder, "processor_config.json")):  # snapshots from before November 2024
        names = ("image_token", "num_additional_image_tokens", "patch_size", "vision_feature_select_strategy")
        settings = {name: getattr(processor, name) for name in names} | {"processor_class": "LlavaNextProcessor"}
        write_json(os.path.join(folder, "processor_config.json"), settings)
    file = os.path.join(folder, "config.json")
    if os.path.isfile(file):  # an adapter has none
        dtype = dtype or read_json(file)["dtype"]
        config = read_json(os.path.join(source, "config.json"))
        for part in (config, config["text_config"], config["vision_config"]):
            part |= {"dtype": dtype, "torch_dtype": dtype}  # the name that transformers 4 reads
        if task is not None:  # for other tools; the order is that of the labels everywhere
            labels = list(dict.fromkeys(task["folder_to_label"].values()))
            config["id2label"] = {str(i): label for i, label in enumerate(labels)}
            config["label2id"] = {label: i for i, label in enumerate(labels)}
        write_json(file, config)
    if task is not None:
        if task["image_view"] == "whole":
            write_whole_files(folder)
        write_task(folder, task)
