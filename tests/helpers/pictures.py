"""Small trees of pictures, and what stands in the files that a check of them leaves."""

import csv
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from animals.command import UserError
from animals.pictures import prepare as data
from animals.pictures.cache import load_split
from config import Config

ROOT = Path(__file__).resolve().parent.parent.parent
CLASSES = ("cat", "dog", "ragno")


def drawn(seed, size=(64, 48)) -> Image.Image:
    """A picture with a shape of its own."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def saved(picture, format, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def make_tree(tmp_path) -> Config:
    """input/ with three classes of four and two pictures."""
    for split, n in (("train", 4), ("validation", 2)):
        for k, folder in enumerate(CLASSES):
            place = tmp_path / "input" / f"{split}_data" / folder
            place.mkdir(parents=True)
            for i in range(n):
                (place / f"{i}.jpg").write_bytes(saved(drawn(1000 * n + 10 * k + i), "JPEG"))
    return Config(str(tmp_path / "input"), str(tmp_path / "temp"), max_excluded=1.0, data_processes=1)


def train(config, *parts) -> Path:
    return Path(config.input_dir, "train_data", *parts)


def held(config, *parts) -> Path:
    return Path(config.input_dir, "validation_data", *parts)


def excluded(config) -> dict[str, str]:
    with open(Path(config.temp_dir) / "excluded.csv", encoding="utf-8", newline="") as file:
        return {Path(row["image"]).name: row["reason"] for row in csv.DictReader(file)}


def images(config, split="train") -> list[str]:
    return [os.path.relpath(row["images"][0], config.input_dir) for row in load_split(config, split)]


def command(config, *arguments) -> list[str]:
    """The command line of data_process_utils.py for the pictures of config."""
    places = ["--input_dir", config.input_dir, "--temp_dir", config.temp_dir]
    return [sys.executable, "data_process_utils.py", *places, *arguments]


def run(command, **options):
    return subprocess.run(command, capture_output=True, text=True, **options)


def python(script, config=None, *arguments, env=os.environ, **options):
    """Run a script that imports from the root in a Python of its own; `config` there is the one given here."""
    if config:
        same = f"config = Config({config.input_dir!r}, {config.temp_dir!r})"
        script = f"import sys; from config import Config; from animals.pictures import cache, prepare; {same}\n{script}"
    return run([sys.executable, "-c", script, *arguments], env=env | {"PYTHONPATH": str(ROOT)}, **options)


def problems(config, **more) -> list[str]:
    """The lines of the error that prepare() raises."""
    with pytest.raises(UserError) as error:
        data.prepare(config, **more)
    return str(error.value).splitlines()


JPEG = saved(drawn(1), "JPEG", quality=90)
PNG = saved(drawn(1), "PNG")
