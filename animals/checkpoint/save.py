"""Complete a saved folder: training wrote the weights, everything else comes from the folder of the original model."""

import os
import shutil
from pathlib import Path

from animals.checkpoint.check import base_of
from animals.checkpoint.family import PROCESSORS
from animals.checkpoint.task import write_task
from animals.files import read_json, write_json

SHARD_SIZE = "5GB"  # the hub's; transformers 5 would write 15 GB into one file

# Training changes weights only. Copied by name, because a source may hold checkpoint-N, .bin, .cache and *.py as well.
COPIED = "added_tokens.json generation_config.json preprocessor_config.json processor_config.json "
COPIED += "special_tokens_map.json tokenizer.json tokenizer.model tokenizer_config.json"


def add_other_files(folder, source, processor, task, dtype=None):
    """Put beside the weights in `folder` what makes it a checkpoint like the one in `source`. Main process only.

    processor: as load_processor(source) returns it. task: None if nobody trained it. dtype: the weights'.
    """
    folder, source = Path(folder), Path(base_of(source))  # of an adapter only the base has these files
    for name in COPIED.split():
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    write_json(folder / "chat_template.json", {"chat_template": processor.chat_template})
    config = read_json(source / "config.json")
    if not (folder / "processor_config.json").is_file():  # snapshots from before November 2024
        names = ("image_token", "num_additional_image_tokens", "patch_size", "vision_feature_select_strategy")
        settings = {"processor_class": PROCESSORS[config["model_type"]]}
        write_json(folder / "processor_config.json", settings | {name: getattr(processor, name) for name in names})
    if (folder / "config.json").is_file():  # an adapter has none
        dtype = dtype or read_json(folder / "config.json")["dtype"]
        for part in (config, config["text_config"], config["vision_config"]):
            part |= {"dtype": dtype, "torch_dtype": dtype}  # transformers 4 reads the second one
        if task is not None:  # for other tools; the order is that of the labels everywhere
            labels = list(dict.fromkeys(task["folder_to_label"].values()))
            config |= {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
        write_json(folder / "config.json", config)
    if task is not None:
        write_task(folder, task)
    share_weights(folder)


def share_weights(folder):
    """Give the weight files the rights that the umask asks for; safetensors lets their owner alone read them."""
    umask = os.umask(0)
    os.umask(umask)
    for file in Path(folder).glob("*.safetensors"):
        if file.stat().st_nlink == 1:  # a hard link of whole_view.py is the source's file
            file.chmod(0o666 & ~umask)
