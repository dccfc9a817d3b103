"""A tiny LLaVA-NeXT as deep as the 7B and of its proportions, with the demo's tokenizer and tiles; and its settings."""

import json
import math
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def build(folder, demo, hidden=72, layers=32, vision_layers=24, seed=0):
    """A checkpoint with the 7B's ratios: heads 4:1, MLP 3.5 x hidden, vision a quarter as wide. `demo`: its model."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    from demo.make_model import hub_name

    folder.mkdir(parents=True)
    for file in demo.iterdir():
        if "safetensors" not in file.name:
            shutil.copy(file, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"hidden_size": hidden, "intermediate_size": 7 * hidden // 2, "num_hidden_layers": layers}
    config["text_config"] |= {"num_attention_heads": 4, "num_key_value_heads": 1}
    config["vision_config"] |= {"hidden_size": hidden // 4 // 2 * 2, "intermediate_size": hidden // 4 // 2 * 8}
    config["vision_config"] |= {"num_attention_heads": 1, "num_hidden_layers": vision_layers}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    model = LlavaNextForConditionalGeneration(LlavaNextConfig(**config))
    weights = {hub_name(name): value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def decoder_layer(config):
    """Elements of one."""
    from animals.training import memory

    every = memory.parameters(config)
    return sum(math.prod(size) for name, size, _ in every if "language_model.layers.0." in name)


def settings(folder, config, hub, changes=None):
    """zero3.json scaled down with the decoder layer, and its yaml; -> (yaml file, zero3)."""
    zero3 = json.loads((ROOT / "scripts" / "zero3.json").read_text())
    stage3 = zero3["zero_optimization"]
    stage3 |= changes or {}
    share = decoder_layer(config) / decoder_layer(hub)
    for key in ("stage3_max_live_parameters", "stage3_max_reuse_distance", "reduce_bucket_size"):
        stage3[key] = int(stage3[key] * share)
    # several sub-groups form; norms and biases stay whole as the 7B's do
    stage3 |= {"sub_group_size": 60_000, "stage3_param_persistence_threshold": 200}
    (folder / "zero3.json").write_text(json.dumps(zero3))
    yaml = (ROOT / "scripts" / "deepspeed_zero3.yaml").read_text()
    assert "scripts/zero3.json" in yaml
    (folder / "zero3.yaml").write_text(yaml.replace("scripts/zero3.json", str(folder / "zero3.json")))
    return folder / "zero3.yaml", zero3
