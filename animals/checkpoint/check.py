"""A checkpoint folder as files: is everything there, and does it fit together? Reads headers, but no weights.

Accepts the copies of the hub's folder that exist: as downloaded, older and newer snapshots, the hub's cache with its
links, ModelScope's copy, what transformers 5 saves, and LoRA adapters to any of them.
"""

import json
import os

from animals.checkpoint.family import family_problem, fetch, model_class, model_config
from animals.command import UserError
from animals.compat import unpartitioned_models
from animals.files import looked_up, read_json


def adapter_config(path):
    """The content of adapter_config.json if `path` is the folder of a LoRA adapter, else None."""
    file = os.path.join(path, "adapter_config.json")
    return read_json(file) if os.path.isfile(file) else None


def base_of(path):
    """The folder of the base checkpoint if `path` is an adapter's folder, else `path` itself."""
    adapter = adapter_config(path)
    return path if adapter is None else str(adapter.get("base_model_name_or_path"))


def holds_model(path):
    """Whether `path` has the settings file of a checkpoint or an adapter; its weights may still be missing."""
    return any(os.path.isfile(os.path.join(path, name)) for name in ("config.json", "adapter_config.json"))


def require_checkpoint(path):
    """Raises UserError, one line per problem, unless `path` holds a checkpoint or adapter that we can use."""
    if problems := check_files(path):
        raise UserError("\n".join(problems))


def check_files(path):
    """-> a list of problems: files that are missing, cut short or of another model. One second for 15 GB, no torch."""
    if adapter_config(path) is not None:
        base = base_of(path)
        if not os.path.isfile(os.path.join(base, "config.json")):
            return [
                f"{path}: found an adapter to the base model {base!r}, which is not there; expected that folder; put "
                f"it there, or write its new place into base_model_name_or_path of {path}/adapter_config.json"
            ]
        return read_shards(path, "adapter_model")[1] + check_files(base)
    if not os.path.isfile(os.path.join(path, "config.json")):
        return [
            f"--model_name_or_path {looked_up(path)}: found no config.json there; expected a checkpoint. Train one: "
            f"`sh train.sh`; or fetch the base model: {fetch('model')}"
        ]
    try:
        if problem := family_problem(read_json(os.path.join(path, "config.json")), path):
            return [problem]
    except UserError as error:
        return [str(error)]
    needed = ["tokenizer_config.json", "tokenizer.json"]  # tokenizer.model alone is read differently
    settings = os.path.join(path, "processor_config.json")
    if not (os.path.isfile(settings) and "image_processor" in read_json(settings)):
        needed.append("preprocessor_config.json")
    absent = [name for name in needed if not os.path.exists(os.path.join(path, name))]
    return read_shards(path)[1] + [f"{path}: {name} is missing: {fetch(path, name)}" for name in absent]


def read_shards(path, stem="model"):
    """-> ({parameter name: shape}, problems) from the headers of the safetensors files. Reads no weights."""
    index = os.path.join(path, f"{stem}.safetensors.index.json")
    shard_of, files = {}, [f"{stem}.safetensors"]
    if os.path.isfile(index):
        try:
            shard_of = read_json(index)["weight_map"]  # parameter name -> file
        except (UserError, KeyError, TypeError):
            return {}, [f"{index}: found no weight_map in it; expected the list of shards; download the file again"]
        files = sorted(set(shard_of.values()))
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
            if absent := [key for key in shard_of if shard_of[key] == name and key not in header]:
                problems.append(f"{file}: found no {first_names(absent)}; expected by {index}: {fetch(path, name)}")
    return shapes, problems


def read_header(file):
    """{parameter name: shape} of a safetensors file. Raises ValueError if it is no such file or is cut short."""
    with open(file, "rb") as opened:
        start, size = opened.read(8), os.stat(file).st_size
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
    complete = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != complete:
        raise ValueError(f"{size:,} bytes although its header says {complete:,}")
    return {name: tuple(entry["shape"]) for name, entry in header.items()}


def first_names(names):
    """The first three names in alphabetical order, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def match_names(model, shapes):
    """-> ({parameter name in the model: (name in the files, shape)}, renaming rules)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    rules, expected, prefix = get_model_conversion_mapping(model), model.state_dict(), model.base_model_prefix
    renaming, others = ([rule for rule in rules if isinstance(rule, WeightRenaming) is kind] for kind in (True, False))
    names = {name: rename_source_key(name, renaming, others, prefix, expected)[0] for name in shapes}
    return {new: (name, shapes[name]) for name, new in names.items()}, rules


def check_weights(path):
    """-> a list of problems: shards missing or cut short; parameters missing, unexpected or of another shape.

    Compares the files' headers with the model that config.json describes, through transformers' own renaming, in
    seconds. Under ZeRO-3 transformers itself reports missing parameters only.
    """
    import torch

    shapes, problems = read_shards(path)
    if problems:
        return problems
    config = model_config(path)
    with unpartitioned_models(), torch.device("meta"):  # without memory
        model = model_class(config)(config)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found, _ = match_names(model, shapes)
    missing = [name for name in expected if name not in found]
    unused = ("position_ids", "inv_freq")  # parameters of older versions, which today's model computes
    unexpected = [found[name][0] for name in found if not (name in expected or name.endswith(unused))]
    if missing:
        problems.append(f"{path}: {len(missing)} parameters are missing: {first_names(missing)}")
    if unexpected:
        problems.append(f"{path}: {len(unexpected)} parameters do not belong to the model: {first_names(unexpected)}")
    for name, (file_name, shape) in found.items():
        if shape != expected.get(name, shape):
            problems.append(f"{path}: {file_name} has shape {list(shape)}; config.json expects {list(expected[name])}")
    if len(problems) > 5:
        problems[5:] = [f"{path}: {len(problems) - 5} more of these"]
    if problems:
        problems.append(f"{path}: the weights and config.json are not of one model; fetch both anew: {fetch(path)}")
    return problems
