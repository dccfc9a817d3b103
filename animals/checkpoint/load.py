"""How a checkpoint folder is read: its processor, its model for training, its model for inference."""

import functools
import re

from animals.checkpoint.check import adapter_config, base_of, check_weights, fetch
from animals.checkpoint.save import SHARD_SIZE
from animals.checkpoint.view import is_whole, model_class, model_config, whole_processor
from animals.command import UserError
from animals.compat import ignoring, save_as_loaded
from animals.ranks import say
from config import CHAT_TEMPLATE

# For a copy without one: ours without what the hub's lacks. Readers of it add BOS themselves.
HUB_TEMPLATE = re.sub(r"\{\{ '<s>' \}\}|\{% (end)?generation %\}", "", CHAT_TEMPLATE)


def load_processor(path, view="tiles"):
    """The checkpoint's processor (of an adapter: its base's) with the PIL image backend, torchvision or not.

    processor.chat_template is the checkpoint's own, mended where old copies have it wrong; training and scoring pass
    Config.chat_template themselves. Old snapshots lack processor_config.json; config.json says the same.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoProcessor

    path = base_of(path)
    processor = AutoProcessor.from_pretrained(path)  # backend="pil" here would reach the tokenizer too
    processor.image_processor = AutoImageProcessor.from_pretrained(path, backend="pil")
    model_config = AutoConfig.from_pretrained(path)
    processor.patch_size = model_config.vision_config.patch_size
    processor.vision_feature_select_strategy = model_config.vision_feature_select_strategy
    processor.num_additional_image_tokens = 1  # CLIP's class token
    template = processor.chat_template
    if template is None:
        say(f"{path}: has no chat template; what is saved gets the hub's")
        processor.chat_template = HUB_TEMPLATE
    elif "\\s>" in template:
        say(f"{path}: its chat template ends answers with <\\s> (an old mistake); what is saved says </s>")
        processor.chat_template = re.sub(r"<\\+s>", "</s>", template)
    tokens = processor.tokenizer.tokenize("<image>\nx")
    if tokens[:2] != ["<image>", "▁"]:  # one token, and the ▁ that some rebuilt tokenizers drop after it
        files = "tokenizer.json tokenizer_config.json added_tokens.json"
        raise UserError(
            f"{path}: its tokenizer cuts '<image>' and a new line into {tokens}; expected '<image>', '▁', ... as the "
            f"model was trained on; fetch the tokenizer anew: {fetch(path, files)}"
        )
    return whole_processor(processor) if view == "whole" and not is_whole(path) else processor


def load_weights(path, view="tiles", **options):
    """The model in `path`, seen in this view; raises UserError unless every parameter is there and fits."""
    problems = check_weights(path, view)
    if problems:
        raise UserError("\n".join(problems))
    config = model_config(path, view)
    kind = model_class(config)
    with ignoring(kind, "image_newline"):
        model, info = kind.from_pretrained(path, config=config, output_loading_info=True, **options)
    wrong = {kind: sorted(info[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]}
    if wrong:
        raise UserError(f"{path}: found weights that do not fit config.json ({wrong}); download the checkpoint again")
    return model


def load_model(path, dtype="bfloat16", view="tiles"):
    """The checkpoint, or base and adapter, for inference on this process's device, without DeepSpeed."""
    import torch
    from accelerate import PartialState

    place = {"": PartialState().device}  # tensor after tensor: no copy of the model in host RAM
    model = load_weights(base_of(path), view, dtype=getattr(torch, dtype), attn_implementation="sdpa", device_map=place)
    if adapter_config(path) is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, path)
    return model.eval().to(PartialState().device)


def load_for_training(model_args, args, view="tiles"):
    """The checkpoint, partitioned over the ranks as it loads when ZeRO-3 is on; in 4 or 8 bit if asked. All ranks."""
    import torch
    from accelerate import PartialState
    from trl import get_quantization_config

    path, problems = model_args.model_name_or_path, []
    zero3 = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
    if model_args.dtype not in ("bfloat16", "float32"):
        problems.append(
            f"--dtype: found {model_args.dtype}; expected bfloat16 or float32 (nothing here scales the loss, which "
            "float16, the checkpoint's own type, would need)"
        )
    if adapter_config(path) is not None:
        problems.append(
            f"--model_name_or_path {path}: found an adapter; expected a plain checkpoint; go on with it by "
            f"--resume_from_checkpoint, or merge it first: `python scripts/merge_lora.py {path} --merge OUT`"
        )
    if model_args.load_in_4bit or model_args.load_in_8bit:
        if not model_args.use_peft:
            problems.append("--load_in_4bit, --load_in_8bit: quantized weights cannot be trained; add --use_peft")
        if zero3:
            problems.append(
                "--load_in_4bit, --load_in_8bit: ZeRO-3 cannot partition quantized weights; add --config_file "
                "scripts/ddp.yaml"
            )
    if problems:
        raise UserError("\n".join(problems))
    quantization = get_quantization_config(model_args)
    options = {} if zero3 else {"device_map": {"": PartialState().device}}  # no copy in host RAM on the way
    if quantization is not None:
        whole = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
        options["quantization_config"] = quantization
        quantization.llm_int8_skip_modules = whole  # 4 bit reads it too
    model = load_weights(
        path,
        view,
        dtype=getattr(torch, model_args.dtype),
        attn_implementation=model_args.attn_implementation or "sdpa",
        **options,
    )
    for module in model.modules():  # bitsandbytes' 4 bit: evaluating on a CPU would repack weights past training
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    save_as_loaded(model)
    model.config.use_cache = False  # of no use in training
    model.save_pretrained = functools.partial(model.save_pretrained, max_shard_size=SHARD_SIZE)
    return model
