"""What an encoder makes of pictures: a row of numbers each, kept by the picture's content and the encoder's weights.

Of a LLaVA-NeXT checkpoint only the vision tower is read (0.6 of 15 GB). Rows are kept in <temp_dir>/features/, a
folder an encoder, some thousand a file, as they are made: what an interrupted run has done is not done again, nor for
a picture that moved or came twice.
"""

import os
from glob import escape, glob
from typing import Any, NamedTuple

from animals.checkpoint.check import base_of, read_shards
from animals.checkpoint.view import is_whole
from animals.command import UserError
from animals.files import read_json, replacing
from animals.pictures.read import PictureError, load_picture
from animals.ranks import main_process

BLOCK = 4096  # pictures a file


class Encoder(NamedTuple):
    """name: of its folder; tells weights, precision and preprocessing. prepare(pictures) -> tensor, on the CPU;
    encode(module, tensor) -> float32 [pictures, features], on the module's device."""

    name: str
    module: Any
    prepare: Any
    encode: Any


def load_tower(path) -> Encoder:
    """The vision tower of a checkpoint: its class token beside its mean patch, of the layer the language model reads.

    float16, its own type, on a GPU; float32 on a CPU. Raises UserError if the checkpoint has no tower.
    """
    import torch
    from safetensors import safe_open
    from transformers import AutoConfig, AutoImageProcessor, CLIPVisionModel

    path, prefix = base_of(path), "vision_tower."
    index = os.path.join(path, "model.safetensors.index.json")
    files = set(read_json(index)["weight_map"].values()) if os.path.isfile(index) else {"model.safetensors"}
    _, problems = read_shards(path)
    if problems:
        raise UserError("\n".join(problems))
    weights = {}
    for file in sorted(files):
        with safe_open(os.path.join(path, file), "pt") as shard:
            names = [key for key in shard.keys() if prefix in key]  # noqa: SIM118 (not a dict)
            weights |= {key.rpartition(prefix)[2]: shard.get_tensor(key) for key in names}
    config = AutoConfig.from_pretrained(path)
    module, info = CLIPVisionModel.from_pretrained(
        None, config=config.vision_config, state_dict=dict(weights), dtype=precision(), output_loading_info=True
    )
    if info["missing_keys"]:
        raise UserError(
            f"{path}: found {len(weights)} weights of a vision tower; expected {len(info['missing_keys'])} more; fetch "
            "the checkpoint again"
        )
    images = AutoImageProcessor.from_pretrained(path, backend="pil")
    side, layer, whole = config.vision_config.image_size, config.vision_feature_layer, is_whole(path)
    layer = layer if isinstance(layer, int) else layer[-1]

    def prepare(pictures):
        grid = {} if whole else {"image_grid_pinpoints": [[side, side]]}
        pixels = images(pictures, **grid, return_tensors="pt")["pixel_values"]
        return pixels if whole else pixels[:, 0]  # [pictures, 3, side, side]; [:, 1] is a whole picture's only tile

    def encode(tower, pixels):
        out = tower(pixels, output_hidden_states=True)
        return torch.cat([out.pooler_output.float(), out.hidden_states[layer][:, 1:].float().mean(1)], dim=1)

    return Encoder(identity(weights, images), module.eval(), prepare, encode)


def precision():
    import torch
    from accelerate import PartialState

    return torch.float32 if PartialState().device.type == "cpu" else torch.float16


def identity(weights, images) -> str:
    """A name that changes with the weights {name: tensor}, the preprocessing or the precision."""
    import torch
    import xxhash

    digest = xxhash.xxh3_128(repr([sorted(images.to_dict().items()), str(precision())]).encode())
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].reshape(-1).contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def features(encoder, pictures, sha256, folder, batch_size=32, workers=0):
    """float32 [pictures, features] on the main rank, None on others, from what `folder` keeps or new. All ranks.

    pictures: paths; sha256: of each file, hexadecimal; workers: processes a rank that decode. A process that is alone
    uses every GPU that it sees. Raises UserError for a picture that can no longer be read.
    """
    import numpy as np
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list, gather_object
    from tqdm import tqdm

    state, folder = PartialState(), os.path.join(folder, encoder.name)
    known, todo = {}, [None]
    if main_process():
        for path in sorted(glob(os.path.join(escape(folder), "*.npz"))):
            with np.load(path) as kept:
                known |= zip(kept["sha256"].tolist(), kept["features"], strict=True)
        todo = [[(s, p) for s, p in dict(zip(sha256, pictures, strict=True)).items() if s not in known]]
    todo = broadcast_object_list(todo)[0]
    with tqdm(total=len(todo), unit="image", desc="features", disable=not main_process() or None) as bar:
        for start in range(0, len(todo), BLOCK):
            block = todo[start : start + BLOCK]
            share = block[state.process_index :: state.num_processes]
            done, problem = [], None
            try:
                for keys, rows in encode_all(encoder, share, batch_size, workers):
                    done.append((keys, rows))
                    bar.update(len(keys) * state.num_processes)
            except PictureError as error:
                problem = f"a picture became unreadable after it was checked ({error}); run again"
            if problems := [text for text in gather_object([problem]) if text]:
                raise UserError(problems[0])
            done = gather_object(done)
            if not main_process():
                continue
            keys, rows = [key for keys, _ in done for key in keys], np.concatenate([rows for _, rows in done])
            os.makedirs(folder, exist_ok=True)
            with replacing(os.path.join(folder, f"{min(keys)}.npz"), "wb") as file:
                np.savez(file, sha256=np.array(keys), features=rows)
            known |= zip(keys, rows, strict=True)
    return np.stack([known[s] for s in sha256]) if main_process() else None


def encode_all(encoder, items, batch_size, workers):
    """Yields (keys, float32 [keys, features]) for (key, path) items, on this rank alone."""
    import copy
    from collections import deque

    import torch
    from accelerate import PartialState

    state = PartialState()
    devices = [state.device]
    if state.num_processes == 1 and state.device.type == "cuda":
        devices = [torch.device("cuda", k) for k in range(torch.cuda.device_count())]
    modules = [copy.deepcopy(encoder.module).to(device) for device in devices]

    def collate(batch):
        try:
            return [key for key, _ in batch], encoder.prepare([load_picture(path) for _, path in batch])
        except PictureError as error:  # names the file; a worker's exception would arrive as another type
            return None, f"{[path for _, path in batch][:1]}: {error}"

    batches = [items[i : i + batch_size] for i in range(0, len(items), batch_size)]
    pending = deque()  # one batch a device: a GPU computes while the next one is fed
    for k, (keys, pixels) in enumerate(
        torch.utils.data.DataLoader(batches, batch_size=None, collate_fn=collate, num_workers=workers)
    ):
        if keys is None:
            raise PictureError(pixels)
        module = modules[k % len(modules)]
        with torch.inference_mode():
            pending.append((keys, encoder.encode(module, pixels.to(devices[k % len(devices)], precision()))))
        if len(pending) >= len(modules):
            keys, rows = pending.popleft()
            yield keys, rows.cpu().numpy()
    while pending:
        keys, rows = pending.popleft()
        yield keys, rows.cpu().numpy()
