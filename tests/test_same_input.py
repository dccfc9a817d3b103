"""Training and inference give the hub's model the same tokens and the same pixels."""

import numpy
import pytest
import torch
from PIL import Image

from animals.checkpoint.load import load_processor
from animals.pictures.read import load_picture
from animals.scoring.scorer import Scorer, score_batches
from animals.training.batches import PictureCollator
from config import Config

PROMPT = [1, 733, 16289, 28793, 28705, 32000, 28705, 13, 3195, 8527, 349, 297, 456, 5754, 28804, 26307, 395, 624, 302]
PROMPT += [1167, 3085, 28747, 11488, 16210, 28725, 5255, 28725, 13088, 28725, 12072, 28725, 3914, 28725, 5939, 17953]
PROMPT += [28725, 7947, 28725, 668, 1184, 28725, 19583, 28725, 4524, 361, 3045, 28723, 733, 28748, 16289, 28793]
ANSWERS = {
    "butterfly": [11488, 16210, 2], "cat": [5255, 2], "chicken": [13088, 2], "cow": [12072, 2], "dog": [3914, 2],
    "elephant": [5939, 17953, 2], "horse": [7947, 2], "spider": [668, 1184, 2], "sheep": [19583, 2],
    "squirrel": [4524, 361, 3045, 2],
}  # fmt: skip


def example(path, label):
    return {"images": [str(path)], "messages": Config().conversation(label)}


def test_prompt_and_answers_token_for_token(hub):
    processor = load_processor(hub)
    scorer = Scorer(processor, Config())
    assert scorer._token_ids() == PROMPT
    assert dict(zip(scorer.labels, scorer.answers, strict=True)) == ANSWERS
    assert processor.tokenizer.tokenize("<image>\nx")[1] == "▁"


@pytest.mark.parametrize("label", ANSWERS)
def test_training_learns_the_answer_and_sees_what_scoring_sees(hub, tmp_path, label):
    """One BOS, the prompt with 1,368 image tokens, the answer's tokens as the only labels: in both."""
    Image.effect_mandelbrot((300, 225), (-2, -1, 1, 1), 50).convert("RGB").save(tmp_path / "a.png")
    processor = load_processor(hub)
    batch = PictureCollator(processor, assistant_only_loss=True)([example(tmp_path / "a.png", label)])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0]
    at = PROMPT.index(32000)
    assert ids[: -len(ANSWERS[label])] == PROMPT[:at] + [32000] * 1368 + PROMPT[at + 1 :]
    assert ids.count(1) == 1
    assert labels[labels != -100].tolist() == ids[-len(ANSWERS[label]) :] == ANSWERS[label]
    assert processor.tokenizer.decode(labels[labels != -100]) == f"{label}</s>"
    scorer = Scorer(processor, Config())
    scored = scorer.collate([load_picture(tmp_path / "a.png")])["input_ids"][0].tolist()
    assert scored[: -len(scorer.fed_ids)] == ids[: -len(ANSWERS[label])]


def save_odd_pictures(folder):
    """Turned by EXIF, transparent, 16-bit, palette with a transparent colour, greyscale, CMYK, 1-bit."""
    random, exif = numpy.random.default_rng(1), Image.Exif()
    colour = Image.fromarray(random.integers(0, 256, (90, 200, 4), dtype=numpy.uint8), "RGBA")
    exif[0x0112] = 6
    colour.convert("RGB").save(folder / "turned.jpg", exif=exif)
    colour.save(folder / "transparent.png")
    Image.fromarray(random.integers(0, 65536, (70, 110), dtype=numpy.uint16)).save(folder / "deep.png")
    colour.convert("RGB").quantize(16).save(folder / "palette.png", transparency=3)
    colour.convert("L").save(folder / "grey.png")
    colour.convert("RGB").convert("CMYK").save(folder / "print.jpg")
    colour.convert("1").save(folder / "bits.png")


def test_training_and_inference_see_the_same_pixels(hub, tmp_path):
    """The collator of train.py beside what score_batches, the loop of validation.py and test.py, hands on."""
    save_odd_pictures(tmp_path)
    processor = load_processor(hub)
    assert type(processor.image_processor).__name__.endswith("Pil")
    collator = PictureCollator(processor, assistant_only_loss=True)

    class Recorder(Scorer):
        def score(self, model, batch, **options):
            scored.append(batch)
            return torch.zeros(len(batch["input_ids"]), len(self.labels))

    for path in sorted(tmp_path.iterdir()):
        scored = []
        list(score_batches(None, Recorder(processor, Config()), [path], [[0]]))
        trained = collator([example(path, "cat")])
        for name in ("pixel_values", "image_sizes"):
            assert torch.equal(trained[name], scored[0][name]), (path.name, name)
        if path.stem == "turned":
            assert trained["image_sizes"].tolist() == [[200, 90]], "EXIF orientation: height, width"
