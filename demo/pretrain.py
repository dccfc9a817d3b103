"""Make demo/vision_tower.safetensors: teach the tiny vision tower to see, as CLIP did before LLaVA was built on it.

    python demo/make_model.py /tmp/untrained --untrained
    python demo/pretrain.py /tmp/untrained

It never sees an animal. It learns to tell apart 80 invented figures, random heaps of blobs, strokes and wedges, by the
mean of the patch features that LLaVA reads. With OMP_NUM_THREADS=1 this took 11 minutes; 0.977 were right in the end.
"""

import argparse
import math
import random
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import AutoProcessor, LlavaNextForConditionalGeneration

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
from drawings import BRIGHT, COATS, rgb, shade
from make_model import PRETRAINED, TILE, hub_name  # noqa: E402
from make_pictures import picture  # noqa: E402

FIGURES = 80


def figure(number):
    """The function that draws an invented figure: six to ten parts, always the same, each moved a little every time."""
    plan = random.Random(f"figure {number}")
    parts = []
    for _ in range(plan.randint(6, 10)):
        kind = plan.choice(("blob", "blob", "blob", "wedge", "limb", "limb", "comb", "curls"))
        tint = plan.choice(("coat", "coat", "dark", "pale", "black", "white", plan.choice(BRIGHT)))
        parts.append((kind, tint, plan.uniform(-0.75, 0.75), plan.uniform(-0.75, 0.75), plan.uniform(0.12, 0.5),
                      plan.uniform(0.1, 0.4), plan.uniform(0, math.pi), plan.random() < 0.35))  # fmt: skip

    def draw(pen, r, coat):
        tints = {
            "coat": coat,
            "dark": shade(coat, 0.6),
            "pale": shade(coat, 1.3),
            "black": "#221e1c",
            "white": "#f6f2ea",
        }
        for kind, tint, x, y, long, short, turn, mirrored in parts:
            colour = rgb(tints.get(tint, tint))
            x, y, turn = x + r.uniform(-0.05, 0.05), y + r.uniform(-0.05, 0.05), turn + r.uniform(-0.15, 0.15)
            for s in (1, -1) if mirrored else (1,):
                cos, sin = s * math.cos(turn), math.sin(turn)
                if kind == "blob":
                    pen.blob(s * x, y, long, short, colour, s * turn)
                elif kind == "wedge":
                    corners = ((-long, -short), (long, 0), (-long, short))
                    pen.shape([(s * x + u * cos - v * sin * s, y + u * sin + v * abs(cos)) for u, v in corners], colour)
                elif kind == "limb":
                    bend = (s * x + long * cos - 0.2 * sin, y + long * sin + 0.2 * cos)
                    pen.line([(s * x - long * cos, y - long * sin), (s * x, y), bend], 0.05 + short / 5, colour)
                elif kind == "comb":
                    for i in range(4):
                        a, b = s * x + (i - 1.5) * 0.15 * cos, y + (i - 1.5) * 0.15 * sin
                        pen.line([(a, b), (a - long * sin * s, b + long * abs(cos))], 0.06, colour)
                else:
                    for i in range(7):
                        a = i * math.tau / 7
                        pen.blob(s * x + long * 0.7 * math.cos(a), y + short * math.sin(a), 0.15, 0.15, colour)

    return draw


def tiles(image):
    """(2, 3, TILE, TILE) bytes: the picture squeezed into one tile, and one tile cut out of it, as LLaVA-NeXT does."""
    x, y = ((side - TILE) * random.randint(0, 2) // 2 for side in image.size)
    pair = (image.resize((TILE, TILE)), image.crop((x, y, x + TILE, y + TILE)))
    return torch.stack(
        [torch.frombuffer(bytearray(t.tobytes()), dtype=torch.uint8).view(TILE, TILE, 3) for t in pair]
    ).permute(0, 3, 1, 2)


def train(parameters, loss_of, n, batch, epochs, rate):
    """Train with AdamW, warm-up and cosine decay over n pictures. loss_of(indices) returns (loss, number right)."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.05)
    steps = epochs * (n // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    start, right, seen, total = time.time(), 0, 0, 0.0
    for step in range(steps):
        if step % (n // batch) == 0:
            order = torch.randperm(n)
        i = step % (n // batch) * batch
        loss, hits = loss_of(order[i : i + batch])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        right, seen, total = right + hits, seen + batch, total + loss.item() * batch
        if (step + 1) % 100 == 0 or step + 1 == steps:
            done = f"{time.time() - start:.0f} s"
            print(f"step {step + 1}/{steps}, loss {total / seen:.3f}, right {right / seen:.3f}, {done}", flush=True)
            right, seen, total = 0, 0, 0.0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of make_model.py --untrained")
    parser.add_argument("--pictures", type=int, default=150, help="how many pictures of each figure")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--out", default=PRETRAINED)
    args = parser.parse_args()
    torch.manual_seed(0)
    random.seed(0)
    processor = AutoProcessor.from_pretrained(args.model)
    model = LlavaNextForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32).train()
    drawers = [figure(k) for k in range(FIGURES)]
    images, names = [], torch.arange(FIGURES).repeat_interleave(args.pictures)
    for i, k in enumerate(names.tolist()):
        images.append(picture(drawers[k], COATS, random.Random(f"pretrain/{i}")))
    seen = torch.stack([tiles(image) for image in images])
    mean, std = (
        torch.tensor(v).view(3, 1, 1)
        for v in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    head = torch.nn.Sequential(torch.nn.LayerNorm(128), torch.nn.Linear(128, FIGURES))
    tower = model.model.vision_tower

    def name_by_tower(index):
        pixels = seen[index, torch.randint(2, index.shape)].float() / 255
        hidden = tower.pre_layrnorm(tower.embeddings((pixels - mean) / std))
        for layer in tower.encoder.layers[:-1]:  # vision_feature_layer is -2: nothing reads the last layer
            hidden = layer(hidden, None)
        logits = head(hidden[:, 1:].mean(1))
        return F.cross_entropy(logits, names[index], label_smoothing=0.05), (
            logits.argmax(1) == names[index]
        ).sum().item()

    train([*tower.parameters(), *head.parameters()], name_by_tower, len(names), 64, args.epochs, 1.5e-3)
    save_file(
        {hub_name(k): v.half().contiguous() for k, v in model.state_dict().items() if "vision_tower" in k},
        args.out,
        metadata={"format": "pt"},
    )
    print(f"{args.out}: {Path(args.out).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
