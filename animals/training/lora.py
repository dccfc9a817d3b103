"""LoRA: train small adapters beside frozen weights.

    sh train.sh --use_peft --learning_rate 2e-4                                     # ZeRO-3, as without LoRA
    sh train.sh --use_peft --learning_rate 2e-4 --config_file scripts/ddp.yaml      # the complete model on each GPU
    sh train.sh --use_peft --learning_rate 2e-4 --config_file scripts/ddp.yaml --load_in_4bit    # QLoRA

    # the tower and the projector train whole, beside adapters in the language model
    sh train.sh --use_peft --learning_rate 2e-4 --train_parts vision,projector --config_file scripts/ddp.yaml

validation.sh and test.py accept the adapter's folder; --resume_from_checkpoint, a checkpoint-N in it. The base model
must still be there.
"""

from animals.checkpoint.check import first_names
from animals.training.parts import BASE, PARTS, belongs, whole_weights

# The linear layers of the language model. The vision tower, the projector and lm_head stay unchanged.
LORA_TARGETS = r".*language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def lora_config(model_args, args):
    """peft's LoraConfig from the flags, or None without --use_peft. Sets args.ddp_find_unused_parameters."""
    from trl import get_peft_config

    config = get_peft_config(model_args)
    if config is not None and model_args.lora_target_modules is None and model_args.lora_target_parameters is None:
        config.target_modules = LORA_TARGETS
        args.ddp_find_unused_parameters = False  # every adapter is used; DDP would search for unused ones
    return config


def describe_trainable(model) -> str:
    """How many parameters train, and with LoRA which."""
    trained, which = [name for name, value in model.named_parameters() if value.requires_grad], ""
    if hasattr(model, "peft_config"):
        count, total = model.get_nb_trainable_parameters()
        names = [name.removeprefix(BASE) for name in whole_weights(model)]
        whole = [part for part in PARTS if any(belongs(name, [part]) for name in names)]
        which = f": {len(trained)} tensors, {first_names(trained)}; parts: {', '.join(['adapters', *whole])}"
    else:
        sizes = {name: getattr(value, "ds_numel", value.numel()) for name, value in model.named_parameters()}
        count, total = sum(sizes[name] for name in trained), sum(sizes.values())  # numel() is 0 under ZeRO-3
    return f"{count:,} of {total:,} parameters = {count / total:.2%}{which}"
