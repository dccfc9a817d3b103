"""--train_parts vision,projector,language: what trains; the rest stays as it is, without gradient and optimizer state.

    sh train.sh --train_parts projector --config_file scripts/ddp.yaml --learning_rate 1e-3

`image_newline` goes with the projector, `lm_head` with the language model. What no gradient can reach never trains: the
language model reads CLIP's last layer but one. Off ZeRO-3, which keeps float32 master weights, the trained weights are
float32 themselves and compute under autocast: at 2e-5 most bfloat16 weights would never move. They are saved in the
type the model was loaded in, and exactly, for resuming, in TRAINED of each checkpoint-N.
"""

import os
import re

from animals.command import UserError

PARTS = {  # part -> how the names of its parameters begin
    "vision": r"model\.vision_tower\.",
    "projector": r"model\.(multi_modal_projector\.|image_newline$)",
    "language": r"(model\.language_model|lm_head)\.",
}
TRAINED = "trained_float32.safetensors"


def read_parts(text: str) -> list[str]:
    """`projector,language` -> its parts, in the model's order."""
    chosen = [part.strip() for part in text.split(",")]
    if wrong := [part for part in chosen if part not in PARTS]:
        raise UserError(f"--train_parts: found {', '.join(wrong)!r}; expected some of {','.join(PARTS)}")
    return [part for part in PARTS if part in chosen]


def belongs(name: str, parts) -> bool:
    """Whether the parameter `name` is of these parts."""
    return any(re.match(PARTS[part], name) for part in parts)


def trains(name: str, parts, config) -> bool:
    """Whether the parameter `name` of the model with this config gets a gradient when `parts` train."""
    if not belongs(name, parts) or "post_layernorm" in name:
        return False
    read, layer = config.vision_feature_layer, re.search(r"vision_tower\..*layers\.(\d+)\.", name)
    layers = config.vision_config.num_hidden_layers
    last = max(n % (layers + 1) for n in (read if isinstance(read, list) else [read]))  # hidden state 0: before layer 0
    return layer is None or int(layer[1]) < last


def check_parts(config, args, model_args):
    """Raises UserError where --train_parts names no parts, or goes with other flags that say what trains."""
    parts, everything = read_parts(config.train_parts), list(PARTS)
    if model_args.use_peft and parts != everything:
        raise UserError("--train_parts: found it beside --use_peft, which trains adapters alone; give one of the two")
    if parts == everything and not model_args.use_peft and not zero3_is_on(args):
        raise UserError(
            "found a run that would train all weights without ZeRO-3; expected ZeRO-3, which divides them, or fewer of "
            "them; add --config_file scripts/deepspeed_zero3.yaml, --use_peft or --train_parts projector"
        )


def zero3_is_on(args) -> bool:
    return bool(args.deepspeed_plugin and args.deepspeed_plugin.zero_stage == 3)


def choose_parts(model, config, args, model_args):
    """Leave a gradient to what --train_parts names; adapters are peft's matter. All ranks."""
    if not model_args.use_peft:
        freeze(model, read_parts(config.train_parts), float32=not zero3_is_on(args))


def freeze(model, parts, float32: bool):
    """Leave a gradient to `parts` alone; float32: of that type, for want of ZeRO-3's master weights. All ranks.

    CLIP's unread end goes with the tower: autocast on the CPU does not mix types within it.
    """
    for name, value in model.named_parameters():
        value.requires_grad_(trains(name, parts, model.config))
        if float32 and belongs(name, parts):
            value.data = value.data.float()


def trained_weights(model):
    """{name: parameter} of what trains."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def in_type(model, dtype: str):
    """The model's state dict in the type in which it was loaded."""
    import torch

    return {name: value.to(getattr(torch, dtype)) for name, value in model.state_dict().items()}


def save_trained(model, folder):
    """The trained weights as they are, for a resume to the bit. Main process only."""
    from safetensors.torch import save_file

    values = {name: value.detach().cpu().contiguous() for name, value in trained_weights(model).items()}
    save_file(values, os.path.join(folder, TRAINED), metadata={"format": "pt"})


def load_trained(model, folder):
    """Put what save_trained() wrote back, if it is there. All ranks."""
    import torch
    from safetensors.torch import load_file

    file = os.path.join(folder, TRAINED)
    if os.path.isfile(file):
        values = load_file(file)
        with torch.no_grad():
            for name, value in trained_weights(model).items():
                value.copy_(values[name])
