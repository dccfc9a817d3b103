"""What is in a checkpoint folder and how it is read: processor, model for training, model for inference."""

import json
import os
import re

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


def checkpoint_name(path):
    """`runs/sft/checkpoint-100` -> `sft-checkpoint-100`, `sft-llava-1.6-7b` -> itself: the report's folder name."""
    parts = os.path.abspath(path).split(os.sep)
    return "-".join(parts[-2:]) if parts[-1].startswith("checkpoint-") else parts[-1]


def run_name(path):
    """The name under which train.py logs to TensorBoard: of the run's folder, for a checkpoint-N in it too."""
    path = os.path.abspath(path)
    return os.path.basename(os.path.dirname(path) if os.path.basename(path).startswith("checkpoint-") else path)


def saved_steps(path):
    """{N: folder} of the checkpoint-N in a run's folder, in order."""
    found = {int(name[11:]): name for name in os.listdir(path) if re.fullmatch(r"checkpoint-\d+", name)}
    return {step: os.path.join(path, found[step]) for step in sorted(found)}


def global_step(path):
    """After how many optimizer steps it was saved: trainer_state.json, else its name, else the run's last; or None."""
    state = os.path.join(path, "trainer_state.json")
    if os.path.isfile(state):
        with open(state, encoding="utf-8") as file:
            return json.load(file)["global_step"]
    named = re.fullmatch(r"checkpoint-(\d+)", os.path.basename(os.path.abspath(path)))
    return int(named[1]) if named else max(saved_steps(path), default=None)


def find_checkpoints(path):
    """Every checkpoint-N of a run, in order, and the final model if it is there; fit for use or not.

    Raises UserError if there is none.
    """
    found = list(saved_steps(path).values()) if os.path.isdir(path) else []
    if os.path.isfile(os.path.join(path, "config.json")):
        found.append(path)
    if not found:
        raise UserError(
            f"--all_checkpoints: found no checkpoint-N and no model in {path}; expected the output folder of a "
            "training; name it with --model_name_or_path"
        )
    return found
