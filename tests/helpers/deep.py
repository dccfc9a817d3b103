"""A tiny LLaVA-NeXT as deep as the 7B and of its proportions, and scripts/zero3.json scaled down to it."""

import json
import math
import shutil
from pathlib import Path

from scripts.memory_plan import parameters

ROOT = Path(__file__).resolve().parent.parent.parent


def build(folder, demo, hidden=72, layers=32, vision_layers=24):
    """A checkpoint with the 7B's ratios: heads 4:1, MLP 3.5 x hidden, vision a quarter as wide.

    demo: the folder of the demo's model, whose tokenizer and tiles it takes.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    from demo.make_model import hub_name

    shutil.copytree(demo, folder, ignore=shutil.ignore_patterns("*safetensors*"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"hidden_size": hidden, "intermediate_size": 7 * hidden // 2, "num_hidden_layers": layers}
    config["text_config"] |= {"num_attention_heads": 4, "num_key_value_heads": 1}
    config["vision_config"] |= {"hidden_size": hidden // 4 // 2 * 2, "intermediate_size": hidden // 4 // 2 * 8}
    config["vision_config"] |= {"num_attention_heads": 1, "num_hidden_layers": vision_layers}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = LlavaNextForConditionalGeneration(LlavaNextConfig(**config))
    weights = {hub_name(name): value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def decoder_layer(config):
    """The elements of one decoder layer."""
    shapes = parameters(config).items()
    return sum(math.prod(shape) for name, shape in shapes if "language_model.layers.0." in name)


def settings(folder, config, hub):
    """(accelerate's yaml file, settings): zero3.json without offload, its sizes scaled by the decoder layer."""
    zero3 = json.loads((ROOT / "scripts" / "zero3.json").read_text())
    stage3 = zero3["zero_optimization"]
    for key in ("stage3_max_live_parameters", "stage3_max_reuse_distance", "reduce_bucket_size"):
        stage3[key] = int(stage3[key] * decoder_layer(config) / decoder_layer(hub))
    # Several sub-groups form, and the norms and biases stay complete on each rank, as those of the 7B do.
    stage3 |= {"sub_group_size": 60_000, "stage3_param_persistence_threshold": 200}
    del stage3["offload_param"]
    (folder / "zero3.json").write_text(json.dumps(zero3))
    yaml = (ROOT / "scripts" / "deepspeed_zero3.yaml").read_text()
    assert "scripts/zero3.json" in yaml
    (folder / "zero3.yaml").write_text(yaml.replace("scripts/zero3.json", str(folder / "zero3.json")))
    return folder / "zero3.yaml", zero3
