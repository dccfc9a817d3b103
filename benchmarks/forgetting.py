"""What fine-tuning on one question makes a model forget: its loss on plain text and on captions, before and after.

    python benchmarks/forgetting.py teach CHECKPOINT INPUT     # changes CHECKPOINT; seeds and order are fixed
    python benchmarks/forgetting.py measure CHECKPOINT INPUT   # prints {"text": ..., "captions": ...}

training.py runs both. The demo's language model has learned nothing but the names of ten animals, so it has nothing to
forget. teach trains projector and language model on English text, on captions and, so that it stays known, on the
demo's question. Both losses are the mean of -log p in nats per token: of that text, and of the captions of SHOWN
held-out pictures per class. The text is this repository's LICENSE, which does not change; it is too short to teach
English, so its loss says how much of a text that the model knew it still knows.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from animals.checkpoint.load import load_model, load_processor, load_weights
from animals.checkpoint.task import read_task
from animals.command import run
from animals.compat import save_as_loaded
from animals.scoring.scorer import Scorer, score_pictures
from animals.training.batches import PictureCollator
from animals.training.parts import freeze
from config import FOLDER_TO_LABEL, Config

CAPTION = {"prompt": "Describe the picture.", "answer": "This is a picture of a {label}, an animal."}
STEPS, LEARNING_RATE = 300, 1e-3
PICTURES, WINDOWS, LENGTH = 8, 8, 128  # per step: pictures, pieces of text; tokens of a piece
SHOWN = 20  # as many as there are shapes of pictures in turns (training_page.py)


def settings(path, **texts):
    """The Config of a question, in the chat format of the checkpoint; without texts that of the demo's question."""
    config = Config(**texts)
    config.chat_template = read_task(path)["chat_template"]
    return config


def windows(processor):
    """The text in tokens [pieces, LENGTH + 1], each piece after <s>."""
    text = " ".join((ROOT / "LICENSE").read_text(encoding="utf-8").split())
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)
    return torch.nn.functional.pad(pieces, (1, 0), value=processor.tokenizer.bos_token_id)


def text_loss(model, pieces):
    logits = model(input_ids=pieces[:, :-1], attention_mask=torch.ones_like(pieces[:, :-1]), use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), pieces[:, 1:].flatten())


def teach(path, folder):
    """Train the checkpoint in `path` and write it there again, in bfloat16 as it was -> the last step's losses."""
    torch.manual_seed(0)
    order, processor, questions = random.Random(0), load_processor(path), (settings(path), settings(path, **CAPTION))
    model = load_weights(path, dtype=torch.float32, attn_implementation="sdpa").train()
    save_as_loaded(model)
    freeze(model, ["projector", "language"], float32=False)
    collate, pieces = PictureCollator(processor, True, questions[0].chat_template), windows(processor)
    rows = [
        {"images": [str(file)], "messages": question.conversation(FOLDER_TO_LABEL[file.parent.name])}
        for file in sorted(folder.glob("train_data/*/*.jpg"))
        for question in questions
    ]
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, STEPS)
    for _ in range(STEPS):
        batch = collate(order.sample(rows, PICTURES))
        del batch["pictures"]  # their paths
        pictures = model(**batch, use_cache=False).loss
        text = text_loss(model, pieces[order.sample(range(len(pieces)), WINDOWS)])
        (pictures + text).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.to(torch.bfloat16).save_pretrained(path)
    return {"pictures": float(pictures), "text": float(text)}


def measure(path, folder):
    """{"text": nats per token, "captions": the same} of a checkpoint or an adapter."""
    processor, model, config = load_processor(path), load_model(path, "float32"), settings(path, **CAPTION)
    scorer = Scorer(processor, config)
    files = [file for name in FOLDER_TO_LABEL for file in sorted((folder / "validation_data" / name).iterdir())[:SHOWN]]
    truth = torch.tensor([scorer.labels.index(FOLDER_TO_LABEL[file.parent.name]) for file in files])
    log_p = score_pictures(model, scorer, list(map(str, files)), 20, [0] * len(files))[range(len(files)), truth]
    tokens = torch.tensor([len(answer) for answer in scorer.answers])[truth].sum()
    return {"text": text_loss(model, windows(processor)).item(), "captions": float(-log_p.sum() / tokens)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["teach", "measure"])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("input", type=Path, help="folder with train_data and validation_data, as draw() makes it")
    args = parser.parse_args()
    print(json.dumps({"teach": teach, "measure": measure}[args.command](args.checkpoint, args.input)))


if __name__ == "__main__":
    run(main)
