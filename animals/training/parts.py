"""--train_parts vision,projector,language: which weights train. The others get no gradient and no optimizer state.

    sh train.sh --train_parts projector --config_file scripts/ddp.yaml --learning_rate 1e-3
    sh train.sh --train_parts attention                     # q, k, v, o of the language model: other skills are kept

Training these attention projections alone keeps most of what the language model could do before (arXiv:2510.08564).
CLIP's last layer never trains: the language model reads the one before it. Without ZeRO-3, which keeps float32 master
weights, the trained weights themselves are float32 and compute under autocast: at a learning rate of 2e-5 most bfloat16
weights would never change. They are saved in the type in which the model was loaded; for resuming, a checkpoint-N also
has them exactly, in TRAINED.
"""

import os
import re

from animals.checkpoint.load import zero3_is_on
from animals.command import UserError

PARTS = {  # part -> how its parameters' names begin; each parameter is in exactly one
    "vision": r"model\.vision_tower\.",
    "projector": r"model\.(multi_modal_projector\.|image_newline$)",
    "language": r"(model\.language_model|lm_head)\.",
}
NAMED = PARTS | {"attention": r"model\.language_model\..*\.self_attn\.[qkvo]_proj\."}  # what the flag can name
RATES = {"vision_learning_rate": "vision", "projector_learning_rate": "projector"}  # flags of rates of their own
TRAINED = "trained_float32.safetensors"


def read_parts(text: str) -> list[str]:
    """`language,projector` -> [projector, language], in the order of NAMED. UserError for another name."""
    chosen = [part.strip() for part in text.split(",")]
    if wrong := [part for part in chosen if part not in NAMED]:
        raise UserError(f"--train_parts: found {', '.join(wrong)!r}; expected some of {','.join(NAMED)}")
    if {"language", "attention"} <= set(chosen):
        raise UserError("--train_parts: found language,attention; expected one of the two: language holds attention")
    return [part for part in NAMED if part in chosen]


def belongs(name: str, parts) -> bool:
    """Whether the parameter `name` belongs to one of `parts`."""
    return any(re.match(NAMED[part], name) for part in parts)


def trains(name: str, parts, config) -> bool:
    """Whether the parameter `name` of a model with this config gets a gradient when `parts` train."""
    if not belongs(name, parts) or "post_layernorm" in name:
        return False
    layer = re.search(r"vision_tower\..*layers\.(\d+)\.", name)
    read, states = config.vision_feature_layer, config.vision_config.num_hidden_layers + 1  # state 0: layer 0's input
    return layer is None or int(layer[1]) < max(n % states for n in (read if isinstance(read, list) else [read]))


def check_parts(config, args, model_args):
    """Raise UserError if --train_parts names an unknown part or contradicts the other flags."""
    parts, everything = read_parts(config.train_parts), list(PARTS)
    if model_args.use_peft and parts != everything:
        raise UserError("--train_parts: found --use_peft too, which trains adapters alone; give one of the two")
    if parts == everything and not model_args.use_peft and not zero3_is_on(args):
        raise UserError(
            "found a run that would train all weights without ZeRO-3; expected ZeRO-3, which divides them, or fewer of "
            "them; add --config_file scripts/deepspeed_zero3.yaml, --use_peft or --train_parts projector"
        )


def freeze(model, parts, float32: bool):
    """Let `parts` alone get a gradient; float32: convert them, because no ZeRO-3 keeps master weights. All ranks.

    CLIP's last layer is converted with its part: autocast on the CPU does not mix types within the tower.
    """
    for name, value in model.named_parameters():
        value.requires_grad_(trains(name, parts, model.config))
        if float32 and belongs(name, parts):
            value.data = value.data.float()


def parameter_groups(model, rates: dict, rate: float, decayed, weight_decay: float) -> list[dict]:
    """The optimizer's groups: the trained parameters with one learning rate, each rate with and without decay.

    rates: {part: its learning rate, or None for `rate`}. decayed: names. The first group has the language model's
    weights, if these train: the library logs its rate. Each group says which `parts` are in it.
    """
    groups = {}
    for part in reversed(PARTS):
        own = rates.get(part) or rate
        for name, value in model.named_parameters():
            if value.requires_grad and belongs(name.removeprefix("base_model.model."), [part]):
                empty = {"params": [], "parts": [], "lr": own, "weight_decay": weight_decay if name in decayed else 0.0}
                group = groups.setdefault((own, name in decayed), empty)
                group["params"].append(value)
                group["parts"] = list(dict.fromkeys([*group["parts"], part]))
    return list(groups.values())


def trained_weights(model):
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def save_trained(model, folder):
    """Write the trained weights as they are, so that a resumed run continues bit for bit. Main process only."""
    from safetensors.torch import save_file

    values = {name: value.detach().cpu().contiguous() for name, value in trained_weights(model).items()}
    save_file(values, os.path.join(folder, TRAINED), metadata={"format": "pt"})


def load_trained(model, folder):
    """Load what save_trained() wrote. All ranks. UserError for a checkpoint of ZeRO-3 or of LoRA."""
    from safetensors.torch import load_file

    file = os.path.join(folder, TRAINED)
    if not os.path.isfile(file):
        raise UserError(
            f"{folder}: found no {TRAINED}; expected it; resume with the --config_file that it was saved with"
        )
    values = load_file(file)
    for name, value in trained_weights(model).items():
        value.data.copy_(values[name])
