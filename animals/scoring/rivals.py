"""What would a small model do? Logistic regression on the frozen vision tower's features, on the same pictures.

Used by validation.py --linear_probe: features of train.json and validation.json by the checkpoint's own vision tower
(its class token and its mean patch, what the language model reads), cached in <temp_dir>/probe; scikit-learn fits.
"""

import hashlib
import os
import sys

from animals.command import UserError
from animals.pictures.prepare import load_split
from animals.pictures.read import PictureError, load_picture
from animals.scoring.metrics import compare, measure

STRENGTHS = (0.001, 0.01, 0.1, 1.0)  # of C, smaller regularises more; a tenth of the training pictures chooses


def linear_probe(model, processor, config, args, model_right):
    """The probe's report on the held-out pictures, on every rank. All ranks.

    model_right: for each held-out picture whether the large model named it right. `comparison` in the result has the
    large model first.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    splits = {split: load_split(config, split) for split in ("train", "validation")}
    features = {split: features_of(model, processor, data, config, args, split) for split, data in splits.items()}
    result = [None]
    if PartialState().is_main_process:
        labels = config.labels
        answers = {split: [labels.index(label) for label in data["label"]] for split, data in splits.items()}
        predicted, strength = fit(features["train"], answers["train"], features["validation"])
        numbers = measure(labels, answers["validation"], predicted)
        right = [t == p for t, p in zip(answers["validation"], predicted, strict=True)]
        result = [
            {key: numbers[key] for key in ("n", "accuracy", "accuracy_ci95", "macro_f1")}
            | {"n_train": len(answers["train"]), "features": features["train"].shape[1], "C": strength}
            | {"comparison": compare(model_right, right)}
        ]
    return broadcast_object_list(result)[0]


def fit(train, answers, held_out):
    """(predictions for `held_out`, the chosen C). Features float32 [n, features], answers [n]."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, ShuffleSplit
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        {"logisticregression__C": STRENGTHS},
        cv=ShuffleSplit(1, test_size=0.1, random_state=0),
    )
    search.fit(train, answers)
    return search.predict(held_out).tolist(), search.best_params_["logisticregression__C"]


def features_of(model, processor, data, config, args, split):
    """float32 [pictures, features] in the split's order, on every rank. All ranks; from the cache if it is there."""
    import numpy as np
    import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object
    from tqdm import tqdm

    state, pictures = PartialState(), [images[0] for images in data["images"]]
    path = os.path.join(config.temp_dir, "probe", f"{split}-{cache_key(args, data)}.npy")
    cached = [os.path.isfile(path)]  # the main rank's view: all must go the same way
    from accelerate.utils import broadcast_object_list

    if broadcast_object_list(cached)[0]:
        return np.load(path)
    tower = next(module for name, module in model.named_modules() if name.endswith("vision_tower"))
    side = tower.config.image_size
    layer = model.config.vision_feature_layer
    layer = layer if isinstance(layer, int) else layer[-1]
    share = list(range(len(pictures)))[state.process_index :: state.num_processes]
    size = args.per_device_eval_batch_size
    batches = [share[i : i + size] for i in range(0, len(share), size)]

    def collate(indices):
        try:
            opened = [load_picture(pictures[i]) for i in indices]
        except PictureError as error:
            raise UserError(f"a picture became unreadable after it was checked ({error}); run again") from None
        pixels = processor.image_processor(opened, image_grid_pinpoints=[[side, side]], return_tensors="pt")
        return indices, pixels["pixel_values"][:, 0]  # the whole picture; [:, 1] is its only tile

    loader = torch.utils.data.DataLoader(
        batches, batch_size=None, collate_fn=collate, num_workers=args.dataloader_num_workers
    )
    quiet = not (state.is_main_process and sys.stderr.isatty())
    done = []
    with tqdm(total=len(share), unit="image", desc=f"features of {split}", disable=quiet) as bar:
        for indices, pixels in loader:
            with torch.inference_mode():
                out = tower(pixels.to(model.device, model.dtype), output_hidden_states=True)
            patches = out.hidden_states[layer][:, 1:].float().mean(1)  # [batch, width]
            done.append((indices, torch.cat([out.pooler_output.float(), patches], dim=1).cpu().numpy()))
            bar.update(len(indices))
    gathered = gather_object(done)
    result = np.empty((len(pictures), gathered[0][1].shape[1]), dtype=np.float32)
    for indices, features in gathered:
        result[indices] = features
    if state.is_main_process:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        np.save(f"{path}.new.npy", result)
        os.replace(f"{path}.new.npy", path)
    return result


def cache_key(args, data):
    """A hash of the weights' files (size and time), dtype and the pictures' contents."""
    folder = args.model_name_or_path
    weights = sorted(e.name for e in os.scandir(folder) if e.name.endswith((".safetensors", ".bin")))
    stats = [(name, os.stat(os.path.join(folder, name))) for name in weights]
    known = [os.path.abspath(folder), args.dtype, [(name, s.st_size, s.st_mtime_ns) for name, s in stats]]
    return hashlib.blake2b(repr([known, data["sha256"][:]]).encode(), digest_size=12).hexdigest()
