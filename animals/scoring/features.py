"""The features that an encoder computes for pictures, and the regression on them: for audit and baselines alone.

load_tower() reads only the vision tower of a LLaVA checkpoint (0.6 of 15 GB). The features are kept in
<temp_dir>/features/, in one folder per encoder, by the sha256 of each picture's file: an interrupted run does not
compute them again, nor does a run in which a picture was moved or stands twice.
"""

import os
from glob import escape, glob
from typing import Any, NamedTuple

from animals.checkpoint.check import base_of, read_shards
from animals.checkpoint.family import model_config
from animals.checkpoint.task import checkpoint_id
from animals.command import UserError
from animals.files import read_json, replacing
from animals.pictures.inspection import cores
from animals.pictures.read import PictureError, load_picture
from animals.scoring.scorer import load_scorer

BLOCK = 4096  # pictures per file
STRENGTHS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # values to try for C of regression(); smaller regularises more


class Encoder(NamedTuple):
    """A network that computes a row of features per picture, as features() needs it."""

    name: str  # of the folder that keeps its features
    module: Any
    prepare: Any  # (pictures) -> tensor or BatchFeature on the CPU
    encode: Any  # (module, what prepare() gave, on its device) -> float32 [pictures, features] on the module's device


def load_tower(path) -> Encoder:
    """The vision tower of a checkpoint. Its features are the class token and the mean of the patches, side by side.

    The patches come from the layer that the language model reads. The tower computes in precision(). Raises UserError
    if weights of the tower are missing.
    """
    import torch
    from safetensors import safe_open
    from transformers import AutoImageProcessor, CLIPVisionModel

    path, prefix = base_of(path), "vision_tower."
    if problems := read_shards(path)[1]:
        raise UserError("\n".join(problems))
    index = os.path.join(path, "model.safetensors.index.json")
    files = set(read_json(index)["weight_map"].values()) if os.path.isfile(index) else {"model.safetensors"}
    weights = {}
    for file in sorted(files):
        with safe_open(os.path.join(path, file), "pt") as shard:
            names = [key for key in shard.keys() if prefix in key]  # noqa: SIM118 (not a dict)
            weights |= {key.rpartition(prefix)[2]: shard.get_tensor(key) for key in names}
    config = model_config(path)
    module, info = CLIPVisionModel.from_pretrained(
        None, config=config.vision_config, state_dict=dict(weights), dtype=precision(), output_loading_info=True
    )
    if missing := info["missing_keys"]:
        found = f"found {len(weights)} weights of a vision tower; expected {len(missing)} more"
        raise UserError(f"{path}: {found}; fetch the checkpoint again")
    images = AutoImageProcessor.from_pretrained(path, backend="pil")
    side, layer, tiles = config.vision_config.image_size, config.vision_feature_layer, config.model_type != "llava"
    layer = layer if isinstance(layer, int) else layer[-1]
    grid = {"image_grid_pinpoints": [[side, side]]} if tiles else {}  # one tile, the smallest grid there is

    def prepare(pictures):
        pixels = images(pictures, **grid, return_tensors="pt")["pixel_values"]
        return pixels[:, 0] if tiles else pixels  # [pictures, 3, side, side]; [:, 0]: the complete picture, no tile

    def encode(tower, pixels):
        out = tower(pixels, output_hidden_states=True)
        return torch.cat([out.pooler_output.float(), out.hidden_states[layer][:, 1:].float().mean(1)], dim=1)

    return Encoder(encoder_name(weights, images), module.eval(), prepare, encode)


def load_hidden(path, config) -> Encoder:
    """A checkpoint as Scorer asks it. Its features are the last hidden state from which the answer is predicted.

    That is output_hidden_states[-1] at the prompt's last token [hidden]. config: resolved for this checkpoint. The
    model computes in precision(). Raises UserError for a checkpoint that cannot be read.
    """
    dtype = str(precision()).removeprefix("torch.")
    scorer, model = load_scorer(path, config, dtype)
    plain = model.get_base_model() if hasattr(model, "peft_config") else model

    def encode(module, batch):
        place = -1 - len(scorer.fed_ids)  # of the prompt's last token: the answers follow it
        return module(**batch, use_cache=False).last_hidden_state[:, place].float()

    return Encoder(f"hidden-{checkpoint_id(path, dtype, config)}", plain.model, scorer.collate, encode)


def precision():
    """float16, the type of the published towers, on a GPU; float32 on a CPU."""
    import torch

    return torch.float16 if torch.cuda.is_available() else torch.float32


def encoder_name(weights, images) -> str:
    """A name that changes with the weights {name: tensor}, the image processor's settings or the precision."""
    import joblib
    import torch

    contents = {name: tensor.reshape(-1).view(torch.uint8).numpy() for name, tensor in weights.items()}
    return joblib.hash([repr(sorted(images.to_dict().items())), str(precision()), contents])


def features(encoder, pictures, sha256, config, batch_size=32):
    """float32 [pictures, features] for paths and the sha256 of their files: kept ones, or computed now.

    Raises UserError for a picture that can no longer be read.
    """
    import numpy as np
    from tqdm import tqdm

    folder, known = os.path.join(config.temp_dir, "features", encoder.name), {}
    for path in glob(os.path.join(escape(folder), "*.npz")):
        with np.load(path) as kept:
            known |= zip(kept["sha256"].tolist(), kept["features"], strict=True)
    new = [(sha, path) for sha, path in dict(zip(sha256, pictures, strict=True)).items() if sha not in known]
    with tqdm(total=len(new), unit="image", desc="features", disable=None) as bar:
        for start in range(0, len(new), BLOCK):
            done = {}
            for keys, rows in encode_all(encoder, new[start : start + BLOCK], config, batch_size):
                done |= zip(keys, rows, strict=True)
                bar.update(len(keys))
            os.makedirs(folder, exist_ok=True)
            with replacing(os.path.join(folder, f"{min(done)}.npz"), "wb") as file:
                np.savez(file, sha256=np.array(list(done)), features=np.stack(list(done.values())))
            known |= done
    return np.stack([known[sha] for sha in sha256])


def encode_all(encoder, items, config, batch_size):
    """Yields (sha256s, float32 [pictures, features] in numpy) for each batch of the (sha256, path) items."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    workers = cores(config.data_processes) if device.type == "cuda" else 0  # a CPU has no time left to decode
    module = encoder.module.to(device)

    def collate(batch):
        pictures = []
        try:
            for _, path in batch:
                pictures.append(load_picture(path))
        except PictureError as error:  # handed back, because a worker's exception would arrive as another type
            return None, f"{path}: {error}"
        return [key for key, _ in batch], encoder.prepare(pictures)

    batches = [items[i : i + batch_size] for i in range(0, len(items), batch_size)]
    loader = torch.utils.data.DataLoader(batches, batch_size=None, collate_fn=collate, num_workers=workers)
    for keys, pixels in loader:
        if keys is None:
            raise UserError(f"a picture became unreadable after it was checked ({pixels}); run again")
        with torch.inference_mode():
            yield keys, encoder.encode(module, pixels.to(device, precision())).cpu().numpy()


def regression(strength=1.0):
    """Logistic regression on scaled features with C = `strength`: scikit-learn's Pipeline, not yet fitted."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))


def fit(train, labels, held_out):
    """(a label per row of `held_out`, the C that is best on a tenth of `train`). Features are float32 [n, features]."""
    from sklearn.model_selection import GridSearchCV, ShuffleSplit
    from threadpoolctl import threadpool_limits

    tenth = ShuffleSplit(1, test_size=0.1, random_state=0)
    search = GridSearchCV(regression(), {"logisticregression__C": STRENGTHS}, cv=tenth)
    with threadpool_limits(1):  # in such small products threads wait for each other longer than they work
        search.fit(train, labels)
    return search.predict(held_out).tolist(), search.best_params_["logisticregression__C"]
