"""Draw pictures of ten kinds of animals, so that the demo needs no download.

    python demo/make_pictures.py temp/demo/input --seed 0

Writes OUT_DIR/{train_data,validation_data}/<class folder>/NNN.jpg and OUT_DIR/test_data/NNN.jpg (no labels).
Each picture has its own random stream, seeded by seed, split, folder and number: more pictures change no others.
"""

import argparse
import random
import sys
from pathlib import Path

from PIL import Image

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
from drawings import ANIMALS, BRIGHT, COATS, Pen, rgb, shade

from config import FOLDER_TO_LABEL

SIZES = [(96, 96), (120, 96), (128, 96), (144, 96), (96, 120), (96, 128)]  # pixels, width x height
OVERSAMPLE = 4  # draw this much larger, then shrink: smooth edges


def clutter(image, r, front):
    """Draw grass, stones, clouds and strokes; in front of the animal only a little grass."""
    w, h = image.size
    for _ in range(r.randint(0, 4) if front else r.randint(5, 14)):
        pen, colour = (
            Pen(image, r.uniform(0, w), r.uniform(0, h), r.uniform(0.05, 0.14) * h),
            rgb(r.choice(BRIGHT + COATS)),
        )
        kind = "grass" if front else r.choice(("grass", "grass", "stone", "cloud", "stroke"))
        if kind == "grass":
            pen = Pen(
                image,
                r.uniform(0, w),
                h * r.uniform(0.9, 1.0) if front else r.uniform(0.5, 1.0) * h,
                r.uniform(0.05, 0.12) * h,
            )
            for x in (-0.4, 0, 0.4):
                pen.line([(x, 0), (x * 1.8 + r.uniform(-0.2, 0.2), -1)], 0.13, shade("#5f9a3c", r.uniform(0.6, 1.4)))
        elif kind == "stone":
            pen.blob(0, 0, 1, r.uniform(0.5, 0.8), shade("#9a948c", r.uniform(0.6, 1.3)), edge=0.1)
        elif kind == "cloud":
            for x in (-0.9, 0, 0.9):
                pen.blob(x, 0, 0.8, 0.6 + 0.3 * (x == 0), "#f6f8fb", edge=0)
        else:
            pen.line([(r.uniform(-1.5, 1.5), r.uniform(-1.5, 1.5)) for _ in range(3)], 0.15, colour)


def picture(animal, coats, r, size=None, fills=(0.8, 0.98)):
    """One picture. animal: a function (pen, r, coat) of drawings.py; r: the random stream that makes every choice.

    size: (width, height) in pixels; one of SIZES without it. fills: the least and the largest share of the picture's
    shorter side that the animal takes.
    """
    size = size or r.choice(SIZES)
    w, h = (OVERSAMPLE * s for s in size)
    top, bottom = (shade(r.choice(BRIGHT + COATS), r.uniform(0.7, 1.4)) for _ in range(2))
    mask = Image.linear_gradient("L").resize((w, h)) if r.random() < 0.6 else Image.new("L", (w, h))
    if r.random() < 0.4:
        mask.paste(255, (0, round(h * r.uniform(0.5, 0.8)), w, h))  # a horizon
    image = Image.composite(Image.new("RGB", (w, h), bottom), Image.new("RGB", (w, h), top), mask)
    clutter(image, r, front=False)
    scale = min(w, h) / 2 * r.uniform(*fills)
    x, y = w / 2 + r.uniform(-1, 1) * (w / 2 - scale), h / 2 + r.uniform(-1, 1) * (h / 2 - scale)
    coat = shade(r.choice(coats), r.uniform(0.85, 1.15))
    animal(Pen(image, x, y, scale, r.uniform(-0.15, 0.15), r.random() < 0.5), r, coat)
    clutter(image, r, front=True)
    return image.reduce(OVERSAMPLE)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=150, help="pictures per class to train on")
    parser.add_argument("--validation", type=int, default=30, help="held-out pictures per class")
    parser.add_argument("--test", type=int, default=12, help="pictures without a label, in all")
    args = parser.parse_args()
    jobs = [("train_data", f, i) for f in FOLDER_TO_LABEL for i in range(args.train)]
    jobs += [("validation_data", f, i) for f in FOLDER_TO_LABEL for i in range(args.validation)]
    jobs += [("test_data", None, i) for i in range(args.test)]
    for split, folder, number in jobs:
        r = random.Random(f"{args.seed}/{split}/{folder}/{number}")
        label = FOLDER_TO_LABEL[folder or r.choice(list(FOLDER_TO_LABEL))]
        path = args.out_dir / split / (folder or "") / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(*ANIMALS[label], r).save(path, quality=92)


if __name__ == "__main__":
    main()
