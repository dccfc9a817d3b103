"""What is in a checkpoint folder and how it is read: processor, model for training, model for inference."""

from config import UserError


def load_processor(path):
    """The checkpoint's processor with the PIL image backend, the same with and without torchvision installed.

    Old snapshots lack processor_config.json; what it would say then comes from config.json.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoProcessor

    processor = AutoProcessor.from_pretrained(path)  # backend="pil" here would reach the tokenizer too
    processor.image_processor = AutoImageProcessor.from_pretrained(path, backend="pil")
    if processor.patch_size is None or processor.vision_feature_select_strategy is None:
        model_config = AutoConfig.from_pretrained(path)
        processor.patch_size = model_config.vision_config.patch_size
        processor.vision_feature_select_strategy = model_config.vision_feature_select_strategy
        processor.num_additional_image_tokens = 1  # CLIP's class token
    return processor


def load_model(path, dtype="bfloat16"):
    """The checkpoint for inference on this process's device, without DeepSpeed. Raises on missing or extra weights."""
    import torch
    from accelerate import PartialState
    from transformers import LlavaNextForConditionalGeneration

    model, info = LlavaNextForConditionalGeneration.from_pretrained(
        path, dtype=getattr(torch, dtype), attn_implementation="sdpa", output_loading_info=True
    )
    wrong = {kind: sorted(info[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]}
    if wrong:
        raise UserError(f"{path}: found weights that do not fit config.json ({wrong}); download the checkpoint again")
    return model.eval().to(PartialState().device)


def load_for_training(model_args, args):
    """The checkpoint, partitioned over the ranks as it loads when ZeRO-3 is on. All ranks."""
    import torch
    from transformers import LlavaNextForConditionalGeneration

    dtype = model_args.dtype if model_args.dtype == "auto" else getattr(torch, model_args.dtype)
    model, info = LlavaNextForConditionalGeneration.from_pretrained(
        model_args.model_name_or_path,
        dtype=dtype,
        attn_implementation=model_args.attn_implementation or "sdpa",
        output_loading_info=True,
    )
    wrong = {kind: sorted(info[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]}
    if wrong:
        raise UserError(f"{model_args.model_name_or_path}: found weights that do not fit config.json: {wrong}")
    # Under ZeRO-3 transformers keeps every renaming rule for the way back, a legacy one included that loading did not
    # use; saving would then write language_model.model.model.*, which only transformers itself reads again.
    model._weight_conversions = [c for c in model._weight_conversions if c.was_used()]
    model.config.use_cache = False  # of no use in training
    return model
