"""A checkpoint folder as files: is all there, and does it fit together? Reads headers, no weights.

Takes what copies of llava-hf/llava-v1.6-mistral-7b-hf look like: as downloaded, older and newer snapshots, the hub's
cache with its links, ModelScope's copy, what transformers 5 saves, and LoRA adapters to any of them.
"""

import functools
import json
import os

from animals.checkpoint.view import model_class, model_config
from animals.command import UserError
from animals.compat import whole_models
from animals.files import read_json

HUB_NAME = "llava-hf/llava-v1.6-mistral-7b-hf"


def fetch(path, name=""):
    """The command that brings a file, or all of them."""
    return f"`hf download {HUB_NAME}{' ' + name if name else ''} --local-dir {path}`"


def adapter_config(path):
    """The adapter's settings if `path` is a LoRA adapter's folder, else None."""
    file = os.path.join(path, "adapter_config.json")
    return read_json(file) if os.path.isfile(file) else None


def base_of(path):
    """The folder of the base checkpoint if `path` is an adapter's, else `path` itself."""
    adapter = adapter_config(path)
    return path if adapter is None else str(adapter.get("base_model_name_or_path"))


def holds_model(path):
    """A checkpoint or an adapter, judged by its settings file; the weights may still be missing."""
    return any(os.path.isfile(os.path.join(path, name)) for name in ("config.json", "adapter_config.json"))


def require_checkpoint(path):
    """Raises UserError, a line a problem, unless `path` holds a checkpoint we can use, or an adapter to one."""
    problems = check_files(path)
    if problems:
        raise UserError("\n".join(problems))


def check_files(path):
    """-> a list of problems: files that are missing, cut short or of another model. A second for 15 GB, no torch."""
    adapter = adapter_config(path)
    if adapter is not None:
        base = base_of(path)
        if not os.path.isfile(os.path.join(base, "config.json")):
            return [
                f"{path}: found an adapter to the base model {base!r}, which is not there; expected that folder; put "
                f"it there, or write its new place into base_model_name_or_path of {path}/adapter_config.json"
            ]
        _, problems = read_shards(path, "adapter_model")
        return problems + check_files(base)
    if not os.path.isfile(os.path.join(path, "config.json")):
        return [
            f"--model_name_or_path {path}: found no config.json there; expected a checkpoint. Train one: "
            f"`sh train.sh`; or fetch the base model: {fetch('model')}"
        ]
    try:
        config = read_json(os.path.join(path, "config.json"))
    except UserError as error:
        return [str(error)]
    kind = config.get("model_type")
    texts = {"llava_next": ("mistral", "llama"), "llava": ("mistral",)}  # llava: what --image_view whole leaves
    if config.get("text_config", {}).get("model_type", "llama") not in texts.get(kind, ()):
        return [f"{path}: found model_type {kind!r} in config.json; expected 'llava_next': {fetch(path)}"]
    if "quantization_config" in config:
        return [
            f"{path}: found a quantized copy (quantization_config in config.json); expected the plain weights: "
            f"{fetch(path)}; --load_in_4bit quantizes them as they load"
        ]
    _, problems = read_shards(path)
    there = {name for name in os.listdir(path) if os.path.exists(os.path.join(path, name))}
    for name in ("tokenizer_config.json", "tokenizer.json"):  # tokenizer.model alone is read differently
        if name not in there:
            problems.append(f"{path}: {name} is missing: {fetch(path, name)}")
    nested = "processor_config.json" in there and "image_processor" in read_json(
        os.path.join(path, "processor_config.json")
    )
    if "preprocessor_config.json" not in there and not nested:
        problems.append(f"{path}: preprocessor_config.json is missing: {fetch(path, 'preprocessor_config.json')}")
    return problems


def read_shards(path, stem="model"):
    """-> ({parameter name: shape}, problems) from the headers of the safetensors files. Reads no weights."""
    index = os.path.join(path, f"{stem}.safetensors.index.json")
    single = f"{stem}.safetensors"
    if os.path.isfile(index):
        try:
            expected = read_json(index)["weight_map"]  # parameter name -> file
        except (UserError, KeyError, TypeError):
            return {}, [f"{index}: found no weight_map in it; expected the list of shards; download the file again"]
        files = sorted(set(expected.values()))
    else:
        expected, files = None, [single]
    shapes, problems = {}, []
    for name in files:
        file = os.path.join(path, name)
        try:
            header = read_header(file)
        except FileNotFoundError:
            problems.append(f"{file}: not found; expected {len(files)} file(s) of weights: {fetch(path, name)}")
        except ValueError as error:
            problems.append(f"{file}: found {error}; delete it and download it again: {fetch(path, name)}")
        else:
            shapes |= header
            lost = sorted(key for key in expected or () if expected[key] == name and key not in header)
            if lost:
                problems.append(f"{file}: found no {some(lost)}; expected by {index}: {fetch(path, name)}")
    return shapes, problems


def read_header(file):
    """{name: shape} of a safetensors file. ValueError says what is wrong with it, its length included."""
    status = os.stat(file)
    return _read_header(file, status.st_size, status.st_mtime_ns)


@functools.cache  # several checks of one start ask for the same headers
def _read_header(file, size, changed):
    with open(file, "rb") as opened:
        start = opened.read(8)
        if start == b"version ":
            raise ValueError("a Git LFS pointer instead of the weights (`git lfs pull` fetches them)")
        length = int.from_bytes(start, "little")
        if not 2 <= length <= size - 8:
            raise ValueError(f"{size:,} bytes that are not safetensors, or cut short")
        try:
            header = json.loads(opened.read(length))
        except ValueError:
            raise ValueError(f"{size:,} bytes that are not safetensors") from None
    header.pop("__metadata__", None)
    whole = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != whole:
        raise ValueError(f"{size:,} bytes where its header tells of {whole:,}")
    return {name: tuple(entry["shape"]) for name, entry in header.items()}


def some(names, most=3):
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


@functools.cache
def meta_model(path, view, changed):
    """The model that config.json describes, in this view, without memory (meta device); whole, even under ZeRO-3.

    changed: the file's time, so that another one is read anew.
    """
    import torch

    config = model_config(path, view)
    with whole_models(), torch.device("meta"):
        return model_class(config)(config)


def match_names(model, shapes):
    """-> ({parameter name in the model: (name in the files, shape)}, the renaming rules, used ones marked)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    rules, there = get_model_conversion_mapping(model), model.state_dict()
    renaming = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    others = [rule for rule in rules if not isinstance(rule, WeightRenaming)]
    prefix = model.base_model_prefix
    return {rename_source_key(name, renaming, others, prefix, there)[0]: (name, shapes[name]) for name in shapes}, rules


def check_weights(path, view="tiles"):
    """-> a list of problems: shards missing or cut short; parameters missing, unexpected or of another shape.

    Compares the files' headers with the model that config.json describes, built without memory (meta device), through
    transformers' own renaming. Under ZeRO-3 transformers itself reports only missing ones. Seconds, reads no weights.
    """
    shapes, problems = read_shards(path)
    if problems:
        return problems
    model = meta_model(path, view, os.stat(os.path.join(path, "config.json")).st_mtime_ns)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found, _ = match_names(model, shapes)
    # buffers of older versions that no longer are parameters; of no use to the whole view
    known = ("position_ids", "inv_freq") + (("image_newline",) if view == "whole" else ())
    unexpected = [found[n][0] for n in found if n not in expected and not n.endswith(known)]
    missing = [name for name in expected if name not in found]
    problems = []
    if missing:
        problems.append(f"{path}: {len(missing)} parameters are missing: {some(missing)}")
    if unexpected:
        problems.append(f"{path}: {len(unexpected)} parameters that config.json knows nothing of: {some(unexpected)}")
    for name in expected.keys() & found.keys():
        was, shape = found[name]
        if shape != expected[name]:
            problems.append(f"{path}: {was} has shape {list(shape)}; config.json expects {list(expected[name])}")
    if problems:
        more = len(problems) - 5
        problems = problems[:5] + ([f"{path}: {more} more of these"] if more > 0 else [])
        problems.append(f"{path}: the weights and config.json are not of one model; fetch both anew: {fetch(path)}")
    return problems
