"""LoRA: train small adapters beside frozen weights, and fold them into a plain checkpoint.

    sh train.sh --use_peft --learning_rate 2e-4                                     # ZeRO-3, as without LoRA
    sh train.sh --use_peft --learning_rate 2e-4 --config_file scripts/ddp.yaml      # the whole model on each GPU
    sh train.sh --use_peft --learning_rate 2e-4 --config_file scripts/ddp.yaml --load_in_4bit    # QLoRA
    python scripts/merge_lora.py sft-llava-1.6-7b --merge merged      # base + adapter

validation.sh, test.py and --resume_from_checkpoint take the adapter's folder as it is. An adapter names its base
model's folder; the two travel together.
"""

import os
import re

from animals.checkpoint.check import adapter_config, require_checkpoint, some
from animals.checkpoint.load import load_model, load_processor
from animals.checkpoint.save import SHARD_SIZE, complete
from animals.checkpoint.task import read_task
from animals.command import UserError

# The language model's linear layers; the vision tower, the projector and lm_head stay as they are.
LORA_TARGETS = r".*language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def lora_config(model_args, args):
    """peft's LoraConfig from the flags, or None; by default on the language model's linear layers alone."""
    from trl import get_peft_config

    config = get_peft_config(model_args)
    if config is not None and model_args.lora_target_modules is None and model_args.lora_target_parameters is None:
        config.target_modules = LORA_TARGETS
        args.ddp_find_unused_parameters = False  # every adapter is used; DDP searches for unused ones otherwise
    return config


def describe_trainable(model):
    """-> how many parameters train, and with LoRA which. Raises UserError if one trains beside what LoRA added."""
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    sizes = [getattr(value, "ds_numel", value.numel()) for value in model.parameters()]  # ZeRO-3: numel() is 0
    if not hasattr(model, "peft_config"):
        count = sum(size for size, value in zip(sizes, model.parameters(), strict=True) if value.requires_grad)
        return f"{count:,} of {sum(sizes):,} parameters = {count / sum(sizes):.2%}"
    strange = [name for name in trained if "lora_" not in name and "modules_to_save" not in name]
    if strange:
        raise UserError(f"--use_peft: {len(strange)} parameters beside the adapters would train: {some(strange)}")
    count, total = model.get_nb_trainable_parameters()
    places = [re.sub(r"^base_model\.model\.|\.lora_.*|\.modules_to_save.*", "", name) for name in trained]
    places = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", place) for place in places))
    common = os.path.commonprefix([f"{place}." for place in places]).rpartition(".")[0]
    names = ", ".join(place.removeprefix(common).strip(".") for place in places)
    where = f" on {common}" if common else ""
    return f"{count:,} of {total:,} parameters = {count / total:.2%}: {len(trained)} tensors{where}: {names}"


def merge(adapter, out, dtype="bfloat16"):
    """Write base + adapter as a plain checkpoint to the folder `out`."""
    if adapter_config(adapter) is None:
        raise UserError(f"{adapter}: found no adapter_config.json; expected what `sh train.sh --use_peft` leaves")
    if os.path.exists(out) and os.listdir(out):
        raise UserError(f"--merge {out}: found files there; expected a new folder; name another one")
    require_checkpoint(adapter)
    task = read_task(adapter)
    view = task["image_view"] if task else "tiles"
    model = load_model(adapter, dtype, view).merge_and_unload(safe_merge=True)
    model.save_pretrained(out, max_shard_size=SHARD_SIZE)
    complete(out, adapter, load_processor(adapter, view), task)
