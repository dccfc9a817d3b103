"""Ten probabilities in one forward pass against generating one word: what does validation.py's scorer cost?

    sh demo/run.sh --max_steps 100 --save_steps 50
    python benchmarks/scorer.py --half_trained temp/demo/sft-llava-demo/checkpoint-50

It runs three ways side by side, with the same pictures and in alternating rounds: the Scorer; (a) one generate() call
per picture; (b) batched generate(), stopped after two tokens, the fewest that an answer needs (a word and </s>). The
picture geometry is the real one (336 px tiles, the hub's five grids); the model is narrow and has random weights, so
that it ends in minutes on a CPU. --half_trained adds the accuracy of both ways on that checkpoint's held-out pictures.
Leaves benchmarks/results/scorer.md. Needs the demo's tokenizer (temp/demo/model, made by demo/make_model.py).
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

from animals.checkpoint.image_tokens import Geometry, image_token_count
from animals.checkpoint.load import load_model, load_processor
from animals.command import run
from animals.pictures.read import list_pictures, load_picture
from animals.scoring.metrics import compare
from animals.scoring.scorer import Scorer, score_pictures
from config import CHAT_TEMPLATE, Config

HUB = Geometry(336, 14, ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)), 1, "default")
SHAPES = [(300, 225), (225, 300), (300, 200), (640, 480), (300, 168), (300, 300), (1024, 768), (259, 194), (200, 300)]
VISION = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_hidden_layers": 4}
# So wide that, as in the 7B, the forward pass spends its time on the weights and not on the attention.
TEXT = {"hidden_size": 1536, "intermediate_size": 5376, "num_attention_heads": 12, "num_key_value_heads": 3}
TEXT |= {"num_hidden_layers": 2, "head_dim": 128}


def make_model(tokenizer_from):
    """(processor, model) with the hub's geometry and the demo's tokenizer; random weights."""
    processor, shape = load_processor(tokenizer_from), LlavaNextConfig.from_pretrained(tokenizer_from)
    images, grids = processor.image_processor, [list(grid) for grid in HUB.pinpoints]
    images.size, images.crop_size = (
        {"shortest_edge": HUB.image_size},
        {"height": HUB.image_size, "width": HUB.image_size},
    )
    images.image_grid_pinpoints = shape.image_grid_pinpoints = grids
    processor.patch_size = shape.vision_config.patch_size = HUB.patch_size
    shape.vision_config.image_size = HUB.image_size
    for part, sizes in ((shape.vision_config, VISION), (shape.text_config, TEXT)):
        for name, value in sizes.items():
            setattr(part, name, value)
    torch.manual_seed(0)
    return processor, LlavaNextForConditionalGeneration(shape).float().eval()


def make_pictures(folder, count):
    """Photograph-like sizes, smooth noise, as JPEGs. -> (paths, image tokens)"""
    random, paths = np.random.default_rng(0), []
    for i in range(count):
        width, height = SHAPES[random.integers(len(SHAPES))]
        width, height = width + int(random.integers(-20, 20)), height + int(random.integers(-20, 20))
        small = Image.fromarray(random.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
        paths.append(os.path.join(folder, f"{i:04}.jpg"))
        small.resize((width, height), Image.Resampling.BICUBIC).save(paths[-1], quality=90)
    return paths, [image_token_count(*load_picture(path).size, HUB) for path in paths]


def generate(processor, model, config, paths, batches, most):
    """The texts that greedy generation gives, in batches of indices."""
    said = [None] * len(paths)
    question = {"type": "text", "text": config.question}
    for indices in batches:
        messages = [
            [{"role": "user", "content": [{"type": "image", "image": load_picture(paths[i])}, question]}]
            for i in indices
        ]
        inputs = processor.apply_chat_template(
            messages, chat_template=CHAT_TEMPLATE, tokenize=True, return_dict=True,
            processor_kwargs={
                "padding": True, "padding_side": "left", "add_special_tokens": False, "return_tensors": "pt",
            },
        )  # fmt: skip
        inputs = inputs.to(model.device, model.dtype)  # integers keep their type
        pad = processor.tokenizer.pad_token_id
        with torch.inference_mode():
            out = model.generate(**inputs, do_sample=False, max_new_tokens=most, pad_token_id=pad)
        for i, row in zip(indices, out[:, inputs["input_ids"].shape[1] :], strict=True):
            said[i] = processor.tokenizer.decode(row, skip_special_tokens=True).strip()
    return said


def in_batches(lengths, size, by_length=True):
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i]) if by_length else list(range(len(lengths)))
    return [order[i : i + size] for i in range(0, len(order), size)]


def padding(lengths, batches):
    """Share of the columns that are padding."""
    return 1 - sum(lengths) / sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)


def accuracy(path, input_dir):
    """Markdown lines: a checkpoint's accuracy by scoring and by generating, on all held-out pictures."""
    config = Config()
    processor, model = load_processor(path), load_model(path, "float32")
    paths, truth = [], []
    for folder, label in config.folder_to_label.items():
        found = list_pictures(os.path.join(input_dir, "validation_data", folder))
        paths, truth = paths + found, truth + [label] * len(found)
    batches = in_batches([0] * len(paths), 20, by_length=False)
    log_p = score_pictures(model, Scorer(processor, config), paths, 20, [0] * len(paths))
    scored = [config.labels[k] == label for k, label in zip(log_p.argmax(1).tolist(), truth, strict=True)]
    said = generate(processor, model, config, paths, batches, 12)
    generated = [word == label for word, label in zip(said, truth, strict=True)]
    c = compare(scored, generated)
    low, high = c["difference_ci95"]
    return [
        f"Accuracy of a half-trained checkpoint ({path}, n = {len(paths)}, chance {1 / len(config.labels):.2f}):",
        "",
        f"| scored | generated | difference (95 % interval) | generated text that is no label |\n|---|---|---|---|\n"
        f"| {c['accuracy']:.4f} | {c['other_accuracy']:.4f} | {c['difference']:+.4f} ({low:+.4f} to {high:+.4f}) "
        f"| {sum(word not in config.labels for word in said)} |",
    ]


def parse_flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer_from", default="temp/demo/model", help="a checkpoint folder made by the demo")
    parser.add_argument("--half_trained", help="a checkpoint that is not done yet, for the accuracies")
    parser.add_argument("--half_input", default="temp/demo/input", help="its pictures")
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--output", default="benchmarks/results/scorer.md")
    return parser.parse_args()


def main():
    args = parse_flags()
    config = Config()
    processor, model = make_model(args.tokenizer_from)
    scorer = Scorer(processor, config)
    with tempfile.TemporaryDirectory() as folder:
        paths, lengths = make_pictures(folder, args.pictures)
        batches, single = in_batches(lengths, args.batch_size), [[i] for i in range(len(paths))]
        ways = {
            "scorer, ten probabilities": lambda: score_pictures(model, scorer, paths, args.batch_size, lengths),
            "(a) generate(), one call per picture": lambda: generate(processor, model, config, paths, single, 2),
            "(b) generate(), batched": lambda: generate(processor, model, config, paths, batches, 2),
        }
        seconds = {name: [] for name in ways}
        for turn in range(args.rounds + 1):
            for name in sorted(ways, reverse=turn % 2 == 1):  # the order alternates; round 0 warms up
                started = time.perf_counter(), time.process_time()
                ways[name]()
                wall, cpu = time.perf_counter() - started[0], time.process_time() - started[1]
                print(f"round {turn}: {name}: {wall:.2f} s, {cpu:.2f} CPU seconds", flush=True)
                seconds[name] += [(wall, cpu)] if turn else []
        started = time.perf_counter()
        opened = [load_picture(path) for path in paths]
        decode = time.perf_counter() - started
        started = time.perf_counter()
        for batch in batches:
            scorer.collate([opened[i] for i in batch])
        prepare = time.perf_counter() - started
        mixed = make_pictures(folder, 300)[1]
    ours = seconds["scorer, ten probabilities"]
    total = statistics.median(wall for wall, _ in ours)
    lines = [
        "# What a score costs\n",
        f"`python {' '.join([os.path.relpath(sys.argv[0]), *sys.argv[1:]])}`\n",
        f"{len(paths)} pictures of {min(lengths):,} to {max(lengths):,} image tokens (mean "
        f"{statistics.mean(lengths):,.0f}), batches of {args.batch_size}, {args.rounds} interleaved rounds after one "
        "to warm up. Real picture geometry (336 px tiles, patch 14) but a small, random model (tower: width "
        f"{VISION['hidden_size']}, {VISION['num_hidden_layers']} layers; language model: width {TEXT['hidden_size']}, "
        f"{TEXT['num_hidden_layers']} layers), float32, "
        f"{torch.get_num_threads()} CPU thread(s), torch {torch.__version__}. Nothing here was measured on a GPU or on "
        "the 7B.\n",
        "The scorer's advantage is given for each round: by the clock, and by CPU seconds, which other work on the "
        "machine disturbs less.\n",
        "| way | gives | images/s (median) | scorer is faster by (clock) | scorer takes less (CPU seconds) |",
        "|---|---|---|---|---|",
    ]
    for name, times in seconds.items():
        speed = len(paths) / statistics.median(wall for wall, _ in times)
        gives, against = "10 probabilities", ["", ""]
        if times is not ours:
            gives = "1 word (2 tokens)"
            pairs = list(zip(times, ours, strict=True))
            against = [", ".join(f"{theirs[k] / mine[k]:.2f}x" for theirs, mine in pairs) for k in (0, 1)]
        lines.append(f"| {name} | {gives} | {speed:.2f} | {against[0]} | {against[1]} |")
    lines += [
        "",
        f"Of the scorer's {total:.1f} s: decoding pictures {decode / total:.1%}, tiles and tokens "
        f"{prepare / total:.1%}, the forward pass the rest.",
        "",
        f"Padding among 300 pictures of mixed shapes ({min(mixed):,} to {max(mixed):,} image tokens), batches of 8: "
        f"{padding(mixed, in_batches(mixed, 8)):.2%} of all columns when formed by length, as validation.py does; "
        f"{padding(mixed, in_batches(mixed, 8, by_length=False)):.1%} in the order of the files.",
        "",
    ]
    if args.half_trained:
        lines += accuracy(args.half_trained, args.half_input)
    text = "\n".join(lines) + "\n"
    Path(args.output).write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    run(main)
