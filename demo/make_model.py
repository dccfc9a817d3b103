"""Write a tiny LLaVA-NeXT checkpoint in the layout of llava-hf/llava-v1.6-mistral-7b-hf.

    python demo/make_model.py temp/demo/model --seed 0

It has the same files, fields and parameter names; only its sizes are small, and its tokenizer knows few words. Its
vision tower is demo/vision_tower.safetensors, which pretrain.py made without any animal; the rest is random.
"""

import argparse
import copy
import json
import math
import re
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from animals.checkpoint.family import HUB_TEMPLATE
from config import Config

PRETRAINED = Path(__file__).resolve().parent / "vision_tower.safetensors"
TILE, PATCH = 96, 12  # pixels; 8 x 8 patches a tile
VISION = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "num_hidden_layers": 4}
TEXT = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 2}
PINPOINTS = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE], [3 * TILE, TILE], [TILE, 3 * TILE]]
SHARP = 1.5  # how strongly a vision head attends to its neighbour
WORDS = "a an the this that is are it in on of and or not yes no what which who picture image photo animal wild bird"


def build_tokenizer() -> Tokenizer:
    """A BPE as Llama's (▁ for a space, byte fallback) in which each word of the prompt and each label is one token."""
    settings = Config()
    words = f"[INST] {settings.question} [/INST] {' '.join(settings.labels)} {WORDS}"
    words = [f"▁{w}" for w in re.findall(r"\w+|[^\w\s]+", words)]
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=special, show_progress=False, initial_alphabet=[chr(i) for i in range(32, 127)]
    )
    # One word at a time: no merge may cross a space, or take in the ▁ between <image> and the newline.
    tokenizer.train_from_iterator([*words, *(w[1:] for w in words)], trainer)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def token(text):
    return {
        "content": text,
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }


def hub_name(name: str) -> str:
    """Today's parameter name -> the name in the hub's files."""
    for new, old in (
        ("lm_head.", "language_model.lm_head."),
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.", ""),
    ):
        if name.startswith(new):
            return old + name.removeprefix(new)
    raise KeyError(name)


def dct(u, v):
    """The (u, v) cosine pattern on one patch, unit norm."""
    x = (torch.arange(PATCH) + 0.5) * math.pi / PATCH
    wave = torch.outer(torch.cos(v * x), torch.cos(u * x))
    return wave / wave.norm()


def init_weights(model):
    """Random weights with the structure that a trained vision tower has, and that it would take longest to learn.

    Cosine patterns read the patches, each attention head of the vision tower attends to one neighbouring patch (as in
    ConViT, arXiv:2103.10697), and the language model starts with the mean of what it has read.
    """
    vision, text = model.model.vision_tower, model.model.language_model
    width, grid = VISION["hidden_size"], TILE // PATCH
    waves = [math.pi / 8, math.pi / 4, math.pi / 2]  # radians a patch
    place = 4 * len(waves)  # the last channels of a patch say where it is
    content = width - place

    # patch embedding: cosine patterns, brightness first; fine patterns are rarer in pictures, so they count more
    freqs = sorted(((u, v) for u in range(PATCH) for v in range(PATCH)), key=lambda f: (f[0] ** 2 + f[1] ** 2, f))
    colours = ([1, 1, 1], [1, 0, -1], [-0.5, 1, -0.5])
    filters = [
        (c, f)
        for c, n in zip(colours, (content - 2 * (content // 4), content // 4, content // 4), strict=True)
        for f in freqs[:n]
    ]
    kernel = torch.zeros_like(vision.embeddings.patch_embedding.weight)
    for row, (colour, (u, v)) in enumerate(filters):
        tint = torch.tensor(colour, dtype=torch.float) / math.sqrt(sum(c * c for c in colour))
        kernel[row] = tint[:, None, None] * dct(u, v) * (0.1 + 0.25 * math.hypot(u, v))
    vision.embeddings.patch_embedding.weight.copy_(kernel)

    y, x = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    where = torch.stack([g(w * axis.flatten()) for w in waves for axis in (x, y) for g in (torch.cos, torch.sin)], 1)
    vision.embeddings.position_embedding.weight.zero_()
    vision.embeddings.position_embedding.weight[1:, content:] = 3 * where
    vision.embeddings.class_embedding.normal_(0, 0.1)
    heads = VISION["num_attention_heads"]
    around = [(dx, dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1) if dx or dy]
    for depth, layer in enumerate(vision.encoder.layers):
        attention, size = layer.self_attn, width // heads
        for linear in (attention.q_proj, attention.k_proj):
            linear.weight.normal_(0, 0.02)
        for head in range(heads):
            rows, step = slice(head * size, head * size + place), around[head % len(around)]
            attention.k_proj.weight[rows, content:] += torch.eye(place)
            turn = []  # a rotation by the offset: cos(a - b) = cos a cos b + sin a sin b
            for w in waves:
                for shift in step:
                    c, s = math.cos(w * shift * (1 + depth)), math.sin(w * shift * (1 + depth))
                    turn.append(torch.tensor([[c, -s], [s, c]]))
            attention.q_proj.weight[rows, content:] += SHARP * torch.block_diag(*turn)
        torch.nn.init.orthogonal_(attention.v_proj.weight)
        torch.nn.init.orthogonal_(attention.out_proj.weight, 0.7)
        layer.mlp.fc1.weight.normal_(0, 1.5 / math.sqrt(width))
        layer.mlp.fc1.bias.normal_(0, 0.5)
        layer.mlp.fc2.weight.normal_(0, 1 / math.sqrt(layer.mlp.fc2.in_features))
    projector = model.model.multi_modal_projector
    torch.nn.init.orthogonal_(projector.linear_1.weight, 1.5)
    torch.nn.init.orthogonal_(projector.linear_2.weight, 1.5)
    text.embed_tokens.weight.normal_(0, 0.1)
    for layer in text.layers:
        attention = layer.self_attn
        for linear in (attention.q_proj, attention.k_proj):
            linear.weight.normal_(0, 0.02)
        torch.nn.init.orthogonal_(attention.v_proj.weight)
        torch.nn.init.orthogonal_(attention.o_proj.weight)
        layer.mlp.gate_proj.weight.normal_(0, 1 / math.sqrt(TEXT["hidden_size"]))
        layer.mlp.up_proj.weight.normal_(0, 1 / math.sqrt(TEXT["hidden_size"]))
        layer.mlp.down_proj.weight.normal_(0, 0.3 / math.sqrt(TEXT["intermediate_size"]))
    model.lm_head.weight.normal_(0, 0.02)


def build_config(image: int, vocab: int) -> dict:
    """The hub's config.json with small sizes; image is the id of <image>."""
    return {
        "architectures": ["LlavaNextForConditionalGeneration"], "ignore_index": -100, "image_grid_pinpoints": PINPOINTS,
        "image_token_index": image, "model_type": "llava_next", "projector_hidden_act": "gelu",
        "text_config": {
            "architectures": ["MistralForCausalLM"], "max_position_embeddings": 4096, "model_type": "mistral",
            "num_key_value_heads": 2, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None,
            "torch_dtype": "bfloat16", "vocab_size": vocab, **TEXT,
        },
        "torch_dtype": "float16", "transformers_version": "4.39.0.dev0", "use_image_newline_parameter": True,
        "vision_config": {
            "image_size": TILE, "model_type": "clip_vision_model", "patch_size": PATCH, "projection_dim": 64,
            "vocab_size": vocab, **VISION,
        },
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "vocab_size": vocab,
    }  # fmt: skip


def random_weights(config: dict, seed: int) -> dict[str, torch.Tensor]:
    """Seeded random weights, under the names of the hub's files."""
    torch.manual_seed(seed)
    model = LlavaNextForConditionalGeneration(LlavaNextConfig.from_dict(copy.deepcopy(config))).float()
    with torch.no_grad():
        init_weights(model)
    return {hub_name(name): tensor.half().contiguous() for name, tensor in model.state_dict().items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights")
    parser.add_argument("--untrained", action="store_true", help="with a random vision tower, for pretrain.py")
    args = parser.parse_args()
    args.out_dir.mkdir(parents=True, exist_ok=True)

    def write(name, content):
        (args.out_dir / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    tokenizer = build_tokenizer()
    base = tokenizer.get_vocab_size()  # 32000 in the hub's; <image> and <pad> follow, then padding to a multiple of 64
    image, pad, vocab = base, base + 1, math.ceil((base + 2) / 64) * 64
    tokenizer.add_special_tokens(["<image>", "<pad>"])
    tokenizer.save(str(args.out_dir / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    names = {0: "<unk>", 1: "<s>", 2: "</s>", image: "<image>", pad: "<pad>"}
    write("added_tokens.json", {"<image>": image, "<pad>": pad})
    write("special_tokens_map.json", {key: token(text) for key, text in special.items()})
    write("tokenizer_config.json", {
        "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False, "legacy": True,
        "added_tokens_decoder": {str(i): token(text) for i, text in names.items()}, "additional_special_tokens": [],
        "extra_special_tokens": {"image_token": "<image>"}, "image_token": "<image>", **special,
        "model_max_length": 1000000000000000019884624838656, "padding_side": "left",
        "processor_class": "LlavaNextProcessor", "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer", "use_default_system_prompt": False,
    })  # fmt: skip
    write("chat_template.json", {"chat_template": HUB_TEMPLATE})
    write("processor_config.json", {
        "image_token": "<image>", "num_additional_image_tokens": 1, "patch_size": PATCH,
        "processor_class": "LlavaNextProcessor", "vision_feature_select_strategy": "default",
    })  # fmt: skip
    write("preprocessor_config.json", {
        "aspect_ratio_setting": "anyres", "crop_size": {"height": TILE, "width": TILE}, "do_center_crop": True,
        "do_convert_rgb": True, "do_normalize": True, "do_pad": True, "do_rescale": True, "do_resize": True,
        "image_grid_pinpoints": PINPOINTS, "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "LlavaNextImageProcessor", "image_std": [0.26862954, 0.26130258, 0.27577711],
        "processor_class": "LlavaNextProcessor", "resample": 3, "rescale_factor": 1 / 255,
        "size": {"shortest_edge": TILE},
    })  # fmt: skip

    config = build_config(image, vocab)
    weights = random_weights(config, args.seed)
    if not args.untrained:
        weights |= load_file(PRETRAINED)
    shards, where = [[], []], {}
    for name in sorted(weights):  # language model and vision tower, as two shards of a large checkpoint would
        shards[name.startswith("vision_tower")].append(name)
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: weights[name] for name in names}, args.out_dir / file, metadata={"format": "pt"})
        where |= dict.fromkeys(names, file)
    size = sum(w.nbytes for w in weights.values())
    write("model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": where})
    write("config.json", config)  # as the hub's: save_pretrained writes today's fields instead
    write("generation_config.json", {
        "_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "transformers_version": "4.39.0.dev0",
    })  # fmt: skip
    print(f"{args.out_dir}: {sum(w.numel() for w in weights.values()):,} parameters, {vocab} tokens")


if __name__ == "__main__":
    main()
