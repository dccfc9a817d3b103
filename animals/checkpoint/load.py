"""How a checkpoint folder is loaded: its processor, its model for training, its model for inference."""

import functools
import re

from animals.checkpoint.check import adapter_config, base_of, check_weights, within_limits
from animals.checkpoint.family import HUB_TEMPLATE, check_tokenizer, in_one_line, model_class, model_config
from animals.checkpoint.save import SHARD_SIZE
from animals.command import Findings, UserError
from animals.compat import save_as_loaded
from animals.ranks import say


def load_processor(path):
    """The checkpoint's processor (for an adapter, its base's), whose chat_template is saved but not used here."""
    from transformers import AutoImageProcessor, AutoProcessor

    path = base_of(path)
    config = model_config(path)
    with in_one_line(path):
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=False)
        # With or without torchvision; backend="pil" for AutoProcessor would reach the tokenizer too.
        processor.image_processor = AutoImageProcessor.from_pretrained(path, backend="pil", trust_remote_code=False)
    # Old snapshots lack processor_config.json.
    processor.patch_size = config.vision_config.patch_size
    processor.vision_feature_select_strategy = config.vision_feature_select_strategy
    processor.num_additional_image_tokens = 1  # CLIP's class token
    template = processor.chat_template
    if template is None:
        say(f"{path}: has no chat template; saved checkpoints get the hub's")
        processor.chat_template = HUB_TEMPLATE
    elif "\\s>" in template:
        say(f"{path}: its chat template ends answers with <\\s> (an old mistake); saved checkpoints get </s>")
        processor.chat_template = re.sub(r"<\\+s>", "</s>", template)
    check_tokenizer(processor.tokenizer, path)
    return processor


def load_weights(path, **options):
    """The model in `path`. Raises UserError unless every parameter is there and fits. options: of from_pretrained()."""
    Findings(check_weights(path)).report()
    model, info = model_class(model_config(path)).from_pretrained(path, output_loading_info=True, **options)
    if wrong := {kind: sorted(names) for kind, names in info.items() if names}:  # also what check_weights() let pass
        raise UserError(f"{path}: found weights that do not fit config.json ({wrong}); download all files again")
    return model


def load_model(path, dtype="bfloat16"):
    """The checkpoint, or base and adapter, for inference on this process's device, without DeepSpeed."""
    import torch
    from accelerate import PartialState

    device = PartialState().device  # tensor after tensor: no copy of the model in host RAM
    options = {"dtype": getattr(torch, dtype), "attn_implementation": "sdpa", "device_map": {"": device}}
    model = load_weights(base_of(path), **options)
    if (adapter := adapter_config(path)) is not None:
        from peft import PeftModel

        if isinstance(pattern := adapter.get("target_modules"), str):
            where = f"{path}/adapter_config.json, target_modules {pattern!r}"
            names = [name for name, _ in model.named_modules()]
            within_limits(lambda: [re.fullmatch(pattern, name) for name in names], where, "a pattern of modules' names")
        with in_one_line(path):
            model = PeftModel.from_pretrained(model, path)
    return model.eval().to(device)


def zero3_is_on(args) -> bool:
    return bool(args.deepspeed_plugin and args.deepspeed_plugin.zero_stage == 3)


def load_for_training(model_args, args):
    """The checkpoint, partitioned over the ranks as it loads if ZeRO-3 is on; in 4 or 8 bit if asked. All ranks."""
    import torch
    from accelerate import PartialState
    from trl import get_quantization_config

    path, problems, zero3 = model_args.model_name_or_path, Findings(), zero3_is_on(args)
    if model_args.dtype not in ("bfloat16", "float32"):
        problems.append(f"--dtype: found {model_args.dtype}; expected bfloat16 or float32 (float16 needs loss scaling)")
    if adapter_config(path) is not None:
        problems.append(
            f"--model_name_or_path {path}: found an adapter; expected a plain checkpoint; go on with it by "
            f"--resume_from_checkpoint, or merge it first: `python scripts/merge_lora.py {path} --merge OUT`"
        )
    flag = "--load_in_4bit" if model_args.load_in_4bit else "--load_in_8bit" if model_args.load_in_8bit else None
    if flag and not model_args.use_peft:
        problems.append(f"{flag}: quantized weights cannot be trained; add --use_peft")
    if flag and zero3:
        problems.append(f"{flag}: ZeRO-3 cannot partition quantized weights; add --config_file scripts/ddp.yaml")
    problems.report()
    options = {} if zero3 else {"device_map": {"": PartialState().device}}  # no copy in host RAM on the way
    if (quantization := get_quantization_config(model_args)) is not None:
        unquantized = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
        quantization.llm_int8_skip_modules = unquantized  # despite int8 in its name, 4-bit loading reads it
        options["quantization_config"] = quantization
    model = load_weights(path, dtype=getattr(torch, model_args.dtype), attn_implementation="sdpa", **options)
    for module in model.modules():  # bitsandbytes' 4 bit: an evaluation on a CPU would make them untrainable
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    save_as_loaded(model)
    model.config.use_cache = False  # of no use in training
    model.save_pretrained = functools.partial(model.save_pretrained, max_shard_size=SHARD_SIZE)
    return model
