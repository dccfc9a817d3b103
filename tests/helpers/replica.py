"""A checkpoint folder like llava-hf/llava-v1.6-mistral-7b-hf as it is downloaded, at any depth and width.

    python tests/helpers/replica.py FOLDER                                     # 2 layers, 64 wide: 8 MB
    python tests/helpers/replica.py FOLDER --layers 1 --vision_layers 2 --full_width    # 0.6 B parameters: 1.2 GB

The hub repository's file names, config fields, parameter names, fp16 and shards, the real tokenizer (mistral-common
ships Mistral's), the real 336 px tiles and five grid shapes; only the values of the weights are drawn at random.
`VARIANTS` changes such a folder into what other copies of the hub's folder look like.
"""

import argparse
import functools
import json
import math
import os
import shutil
from pathlib import Path

HERE = Path(__file__).parent
HUB_CONFIG = json.loads((HERE / "hub_config.json").read_text())
HUB_FILES = json.loads((HERE / "hub_files.json").read_text())  # the other small files: name -> content
MISTRAL_DEFAULTS = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}  # not in config.json
CHAT_TEMPLATE = HUB_FILES["chat_template.json"]["chat_template"]  # no BOS, a space after </s>
SHARDS = 4


def hub_config(layers=32, vision_layers=24, full_width=True):
    """The hub's config.json with fewer layers; if not full_width, with a hidden size of 64 and 4 heads."""
    config = json.loads(json.dumps(HUB_CONFIG))
    text, vision = config["text_config"], config["vision_config"]
    if layers != 32:
        text["num_hidden_layers"] = layers
    vision["num_hidden_layers"] = vision_layers
    if not full_width:
        text |= {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
        vision |= {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    return config


def hub_shapes(config) -> dict[str, tuple]:
    """Parameter name in the hub's files -> shape, in model order, written out: transformers has no part in it."""
    text, vision = MISTRAL_DEFAULTS | config["text_config"], config["vision_config"]
    wide, vocab, inner = text["hidden_size"], text["vocab_size"], text["intermediate_size"]
    kv = wide // text["num_attention_heads"] * text["num_key_value_heads"]
    seen, patch, grid = vision["hidden_size"], vision["patch_size"], vision["image_size"] // vision["patch_size"]
    shapes = {"image_newline": (wide,)}

    def linear(name, out, into, bias=True):
        shapes[f"{name}.weight"] = (out, into)
        if bias:
            shapes[f"{name}.bias"] = (out,)

    def norm(name):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (seen,)

    tower = "vision_tower.vision_model"
    shapes[f"{tower}.embeddings.class_embedding"] = (seen,)
    shapes[f"{tower}.embeddings.patch_embedding.weight"] = (seen, 3, patch, patch)
    shapes[f"{tower}.embeddings.position_embedding.weight"] = (grid * grid + 1, seen)
    norm(f"{tower}.pre_layrnorm")
    for i in range(vision["num_hidden_layers"]):
        layer = f"{tower}.encoder.layers.{i}"
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            linear(f"{layer}.self_attn.{name}", seen, seen)
        norm(f"{layer}.layer_norm1")
        linear(f"{layer}.mlp.fc1", vision["intermediate_size"], seen)
        linear(f"{layer}.mlp.fc2", seen, vision["intermediate_size"])
        norm(f"{layer}.layer_norm2")
    norm(f"{tower}.post_layernorm")
    linear("multi_modal_projector.linear_1", wide, seen)
    linear("multi_modal_projector.linear_2", wide, wide)
    shapes["language_model.model.embed_tokens.weight"] = (vocab, wide)
    for i in range(text["num_hidden_layers"]):
        layer = f"language_model.model.layers.{i}"
        for name, out, into in (("q", wide, wide), ("k", kv, wide), ("v", kv, wide), ("o", wide, wide)):
            linear(f"{layer}.self_attn.{name}_proj", out, into, bias=False)
        for name, out, into in (("gate", inner, wide), ("up", inner, wide), ("down", wide, inner)):
            linear(f"{layer}.mlp.{name}_proj", out, into, bias=False)
        shapes[f"{layer}.input_layernorm.weight"] = shapes[f"{layer}.post_attention_layernorm.weight"] = (wide,)
    shapes["language_model.model.norm.weight"] = (wide,)
    shapes["language_model.lm_head.weight"] = (vocab, wide)
    return shapes


def dump(path, content):
    Path(path).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@functools.cache
def real_tokenizer():
    """Mistral's 32,000 tokens as bytes of tokenizer.model, and the tokenizer.json made of them as in Llama's days."""
    import tempfile

    import mistral_common
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import LlamaTokenizer

    model = (Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1").read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.model").write_bytes(model)
        merged = json.loads(LlamaTokenizer.from_pretrained(folder).backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in merged["merges"]]
    tokenizer = Tokenizer(models.BPE(merged["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    names = ("<unk>", "<s>", "</s>", "<image>", "<pad>")
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    content = json.loads(tokenizer.to_str())
    content["model"]["merges"] = [" ".join(pair) for pair in merges]  # as tokenizers of that time wrote them
    return model, json.dumps(content, indent=2, ensure_ascii=False)


def write_weights(folder, config, seed):
    """Random fp16 weights in SHARDS files and their index. Norms are 1, biases 0, the rest normal."""
    import torch
    from safetensors.torch import save_file

    generator, shapes = torch.Generator().manual_seed(seed), hub_shapes(config)

    def draw(name, shape):
        if name.endswith(("norm.weight", "norm1.weight", "norm2.weight")):
            return torch.ones(shape).half()
        if name.endswith(".bias"):
            return torch.zeros(shape).half()
        spread = 0.5 if "_embedding" in name else 1 / shape[-1] ** 0.5 if len(shape) > 1 else 0.1
        return (torch.randn(shape, generator=generator) * spread).half()

    names, shard_of, count = list(shapes), {}, -(-len(shapes) // SHARDS)
    for shard in range(SHARDS):
        values = {name: draw(name, shapes[name]) for name in names[shard * count : (shard + 1) * count]}
        file = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        save_file(values, folder / file, metadata={"format": "pt"})
        shard_of |= dict.fromkeys(values, file)
    size = 2 * sum(math.prod(shape) for shape in shapes.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(shard_of.items()))}
    dump(folder / "model.safetensors.index.json", index)


def write_holes(folder, config):
    """fp16 weights of which only the header is written: a sparse file of the full length, 15 GB that take no room."""
    entries, end = {}, 0
    for name, shape in hub_shapes(config).items():
        start, end = end, end + 2 * math.prod(shape)
        entries[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)


def build(folder, layers=2, vision_layers=3, full_width=False, seed=0, holes=False) -> Path:
    """Write the replica into `folder`, which is returned. It needs at least one decoder and two vision layers.

    holes: no weights, see write_holes(); what reads headers only takes it for the complete checkpoint.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = hub_config(layers, vision_layers, full_width)
    dump(folder / "config.json", config)
    for name, content in HUB_FILES.items():
        dump(folder / name, content)
    tokenizer_model, tokenizer_json = real_tokenizer()
    (folder / "tokenizer.model").write_bytes(tokenizer_model)
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    if holes:
        write_holes(folder, config)
    else:
        write_weights(folder, config, seed)
    return folder


# --- what other copies look like: each takes a replica and changes it in place ----------------------------------


def without_processor_config(folder):
    """A snapshot from before November 2024."""
    (folder / "processor_config.json").unlink()


def old_template(folder):
    """A snapshot from before 2025: answers end in a literal <\\s>."""
    dump(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE.replace("</s> ", "<\\s> ")})


def jinja_template(folder):
    """As newer repositories hold it."""
    (folder / "chat_template.json").unlink()
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def no_template(folder):
    (folder / "chat_template.json").unlink()


def slow_tokenizer(folder):
    """tokenizer.model and what names the added tokens, no tokenizer.json: transformers 5 loses the ▁ after <image>."""
    (folder / "tokenizer.json").unlink()


def only_tokenizer_model(folder):
    """tokenizer.model alone: nothing says what <image> is. Cannot be used."""
    for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"):
        (folder / name).unlink()


def transformers_5(folder):
    """What transformers 5 leaves when it loads and saves the folder: nested processor_config.json, one shard."""
    import torch
    from transformers import AutoProcessor, LlavaNextForConditionalGeneration

    model = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.float16)
    processor = AutoProcessor.from_pretrained(folder)
    for file in folder.iterdir():
        file.unlink()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def modelscope(folder):
    """As ModelScope serves it: with its own configuration.json."""
    dump(folder / "configuration.json", {"framework": "pytorch", "task": "image-text-to-text", "allow_remote": True})


def hub_cache(folder):
    """As in the hub's cache: every file a symbolic link to a blob beside it."""
    blobs = folder.parent / (folder.name + "-blobs")
    blobs.mkdir()
    for i, file in enumerate(sorted(folder.iterdir())):
        shutil.move(file, blobs / f"{i:040x}")
        file.symlink_to(os.path.relpath(blobs / f"{i:040x}", folder))


USABLE = without_processor_config, old_template, jinja_template, no_template, transformers_5, modelscope, hub_cache
VARIANTS = {f.__name__: f for f in USABLE}
BROKEN = {f.__name__: f for f in (slow_tokenizer, only_tokenizer_model)}


def build_variant(source, folder, name) -> Path:
    """A copy of the replica `source` in `folder`, changed into the variant `name`."""
    folder = Path(shutil.copytree(source, folder))
    (VARIANTS | BROKEN)[name](folder)
    return folder


def pictures(folder, size=(300, 225), seed=0):
    """train_data and validation_data of noise, width x height: two classes, one picture each."""
    import numpy
    from PIL import Image

    random = numpy.random.default_rng(seed)
    for split in ("train_data", "validation_data"):
        for name in ("cat", "dog"):
            (Path(folder) / split / name).mkdir(parents=True)
            pixels = random.integers(0, 256, (size[1], size[0], 3), dtype=numpy.uint8)
            Image.fromarray(pixels).save(Path(folder) / split / name / "a.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vision_layers", type=int, default=3)
    parser.add_argument("--full_width", action="store_true")
    parser.add_argument("--pictures", help="folder for two classes of noise to train on")
    args = parser.parse_args()
    if args.pictures:
        pictures(args.pictures)
    build(args.folder, args.layers, args.vision_layers, args.full_width)
    print(args.folder, sorted(os.listdir(args.folder)))


if __name__ == "__main__":
    main()
