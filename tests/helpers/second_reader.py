"""Read a checkpoint with the transformers that is installed, without any of our code, and write down what it gives.

python tests/helpers/second_reader.py CHECKPOINT OUT.npz              # tokens, pixels and float32 logits of one picture
python tests/helpers/second_reader.py --compare ONE.npz OTHER.npz     # exit code 1 if they differ; logits by over 1e-5
"""

import json
import sys
from pathlib import Path

import numpy as np


def read(folder):
    """-> arrays by name: one picture and question through the folder's own processor, chat template and model."""
    import torch
    import transformers
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

    processor = AutoProcessor.from_pretrained(folder)
    options = {"torch_dtype": torch.float32} if transformers.__version__ < "5" else {"dtype": torch.float32}
    kinds = {"llava": LlavaForConditionalGeneration, "llava_next": LlavaNextForConditionalGeneration}
    kind = kinds[json.loads((Path(folder) / "config.json").read_text())["model_type"]]
    model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]), info
    pixels = np.random.default_rng(0).integers(0, 256, (225, 300, 3), dtype=np.uint8)
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What animal is this?"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "squirrel"}]}
    text = processor.apply_chat_template([question, answer])
    batch = processor(images=Image.fromarray(pixels), text=text, return_tensors="pt")
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    config = model.config.text_config
    return {
        "version": np.array(transformers.__version__),
        "text": np.array(text),
        "ids": batch["input_ids"].numpy(),
        "pixels": batch["pixel_values"].numpy(),
        "logits": logits.numpy(),
        "rope_theta": np.array(getattr(config, "rope_theta", None) or config.rope_parameters["rope_theta"]),
        "added": np.array(sorted(processor.tokenizer.get_added_vocab().items()), dtype=str),
    }  # fmt: skip


def compare(one, other):
    """Print what differs. -> whether nothing does."""
    a, b = np.load(one), np.load(other)
    names = ("text", "ids", "pixels", "rope_theta", "added")
    different = [name for name in names if not np.array_equal(a[name], b[name])]
    for name in different:
        print(f"  {name} differs:\n    {a[name].tolist()!s:.300}\n    {b[name].tolist()!s:.300}")
    far = np.abs(a["logits"] - b["logits"]).max() if a["logits"].shape == b["logits"].shape else np.inf
    verdict = "DIFFERENT" if different or far > 1e-5 else "same"
    versions = f"transformers {a['version']} and {b['version']}"
    print(f"- {Path(one).stem}: {versions}: {verdict}, logits differ by at most {far:.1e}")
    return verdict == "same"


if __name__ == "__main__":
    if sys.argv[1] == "--compare":
        sys.exit(0 if compare(*sys.argv[2:]) else 1)
    np.savez(sys.argv[2], **read(sys.argv[1]))
