"""--train_parts vision,projector,language: which weights train. The others get no gradient and no optimizer state.

    sh train.sh --train_parts projector --config_file scripts/ddp.yaml --learning_rate 1e-3
    sh train.sh --train_parts attention                     # q, k, v, o of the language model: to forget less

To train these attention projections alone is proposed against forgetting (arXiv:2510.08564).
CLIP's last layer never trains: the language model reads the one before it. Without ZeRO-3, which keeps float32 master
weights, the trained weights themselves are float32 and compute under autocast: at a learning rate of 2e-5 most bfloat16
weights would never change. They are saved in the type in which the model was loaded; for resuming, a checkpoint-N also
has them exactly, in TRAINED. With --use_peft, vision and projector may train beside the adapters (lora.py).
"""

import re
from pathlib import Path

from animals.checkpoint.load import zero3_is_on
from animals.command import UserError

PARTS = {  # part -> how its parameters' names begin; each parameter is in exactly one
    "vision": r"model\.vision_tower\.",
    "projector": r"model\.(multi_modal_projector\.|image_newline$)",
    "language": r"(model\.language_model|lm_head)\.",
}
NAMED = PARTS | {"attention": r"model\.language_model\..*\.self_attn\.[qkvo]_proj\."}  # what the flag can name
ALL = "vision,projector,language"  # --train_parts without --use_peft; with it, "none"
RATES = {"vision_learning_rate": "vision", "projector_learning_rate": "projector"}  # flags of rates of their own
TRAINED = "trained_float32.safetensors"
BASE = "base_model.model."  # what peft puts before the names of the base model's parameters


def read_parts(text: str) -> list[str]:
    """`language,projector` -> [projector, language], in the order of NAMED; `none` -> []. UserError: another name."""
    chosen = [part.strip() for part in text.split(",")] if text != "none" else []
    if wrong := [part for part in chosen if part not in NAMED]:
        raise UserError(f"--train_parts: found {', '.join(wrong)!r}; expected some of {','.join(NAMED)}")
    if {"language", "attention"} <= set(chosen):
        raise UserError("--train_parts: found language,attention; expected one of them: language contains attention")
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
    parts, lora = read_parts(config.train_parts), model_args.use_peft
    own = "lora_target_modules", "lora_target_parameters", "lora_modules_to_save"
    if not parts and not lora:
        raise UserError(f"--train_parts none: found no --use_peft; expected it, or some of {','.join(NAMED)}")
    wrong = [part for part in parts if part not in RATES.values()]
    wrong += [f"--{name}" for name in own if parts and getattr(model_args, name)]
    if lora and wrong:
        raise UserError(
            f"--train_parts: found {wrong[0]} with --use_peft; expected vision, projector or both, beside adapters in "
            "the language model alone; leave it out"
        )
    if parts == list(PARTS) and not zero3_is_on(args):
        raise UserError(
            "found a run that would train all weights without ZeRO-3; expected ZeRO-3, which divides them, or fewer of "
            "them; add --config_file scripts/deepspeed_zero3.yaml, --use_peft or --train_parts projector"
        )


def freeze(model, parts, float32: bool):
    """Let `parts` alone get a gradient; float32: convert them, because no ZeRO-3 keeps master weights. All ranks.

    A model that peft has wrapped keeps its adapters' gradients. CLIP's last layer is converted with its part: autocast
    on the CPU does not mix types within the tower.
    """
    for full, value in model.named_parameters():
        name = full.removeprefix(BASE)
        value.requires_grad_(trains(name, parts, model.config) or full != name and value.requires_grad)
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
            if value.requires_grad and belongs(name.removeprefix(BASE), [part]):
                empty = {"params": [], "parts": [], "lr": own, "weight_decay": weight_decay if name in decayed else 0.0}
                group = groups.setdefault((own, name in decayed), empty)
                group["params"].append(value)
                group["parts"] = list(dict.fromkeys([*group["parts"], part]))
    return list(groups.values())


def trained_weights(model):
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def whole_weights(model):
    """{name: value} of the trained weights that are the model's own, not an adapter's."""
    added = re.compile(r"\.lora_|\.modules_to_save\.")
    return {name: value for name, value in trained_weights(model).items() if not added.search(name)}


def save_weights(model, folder, state_dict, dtype):
    """Write the model's weights, or the adapter's and those that trained beside it. Main process only.

    state_dict: as ZeRO-3 gathers it; None: the model's own, which may be float32, and is written in `dtype`. The
    weights beside an adapter are in its file under peft's names, so that peft loads them with it: none can be lost.
    """
    from safetensors.torch import load, save_file

    lora, values = hasattr(model, "peft_config"), model.state_dict() if state_dict is None else state_dict
    if state_dict is None and not lora:
        state_dict = {name: value.to(dtype) for name, value in values.items()}
    model.save_pretrained(folder, state_dict=state_dict)
    if lora and (whole := {name: values[name].to("cpu", dtype).contiguous() for name in whole_weights(model)}):
        file = Path(folder, "adapter_model.safetensors")
        save_file(load(file.read_bytes()) | whole, file, metadata={"format": "pt"})


def save_trained(model, folder):
    """Write the trained weights as they are, so that a resumed run continues bit for bit. Main process only."""
    from safetensors.torch import save_file

    values = {name: value.detach().cpu().contiguous() for name, value in trained_weights(model).items()}
    save_file(values, Path(folder, TRAINED), metadata={"format": "pt"})


def load_trained(model, folder):
    """Load what save_trained() wrote. All ranks. UserError for a checkpoint of ZeRO-3 or of LoRA."""
    from safetensors.torch import load_file

    file = Path(folder, TRAINED)
    if not file.is_file():
        raise UserError(f"{folder}: found no {TRAINED}; expected it; resume with the --config_file that saved it")
    values = load_file(file)
    for name, value in trained_weights(model).items():
        value.data.copy_(values[name])
