"""A checkpoint folder as files: is everything there, and does it fit together? Reads headers, but no weights.

Accepts the copies of the hub's folder that exist: as downloaded, older and newer snapshots, the hub's cache with its
links, ModelScope's copy, what transformers 5 saves, and LoRA adapters to any of them.
"""

import contextlib
import json
import operator
import os
import re
from pathlib import Path

from animals.checkpoint import family
from animals.checkpoint.family import check_family, fetch, in_one_line, model_class, model_config, read_settings
from animals.command import Findings, UserError
from animals.compat import unpartitioned_models
from animals.files import MAX_JSON, looked_up, open_regular

MAX_HEADER = 100_000_000  # bytes; safetensors' own limit

# Of an adapter's settings: what may be other than empty. Others of peft's would import modules (megatron_core), copy
# layers (layer_replication) or run patterns on the parameters' names (rank_pattern).
LORA_KEYS = "auto_mapping base_model_name_or_path bias fan_in_fan_out inference_mode init_lora_weights lora_alpha "
LORA_KEYS += "lora_bias lora_dropout megatron_core modules_to_save peft_type peft_version qalora_group_size r revision "
LORA_KEYS += "target_modules target_parameters task_type use_dora use_rslora"


def adapter_config(path):
    """The content of adapter_config.json if `path` is the folder of a LoRA adapter, else None."""
    return read_settings(path, "adapter_config.json")


def base_of(path):
    """The folder of the base checkpoint if `path` is an adapter's folder, else `path` itself."""
    adapter = adapter_config(path)
    return path if adapter is None else str(adapter.get("base_model_name_or_path"))


def holds_model(path):
    """Whether `path` has the settings file of a checkpoint or an adapter; its weights may still be missing."""
    return any(os.path.isfile(os.path.join(path, name)) for name in ("config.json", "adapter_config.json"))


def require_checkpoint(path):
    """Raises UserError, one line per problem, unless `path` holds a checkpoint or adapter that we can use."""
    Findings(check_files(path)).report()


def check_files(path):
    """-> a list of problems: files that are missing, cut short or of another model. One second for 15 GB, no torch."""
    findings = Findings()
    return findings.attempt(find_problems, path) or findings


def find_problems(path):
    """As check_files(); raises UserError instead where a settings file cannot be understood."""
    findings = Findings()
    for file in Path(path).glob("*"):
        if file.suffix in (".json", ".jinja", ".model"):
            findings.attempt(check_readable, file)
    findings.report()
    if (adapter := adapter_config(path)) is not None:
        return adapter_problems(path, adapter)
    config = read_settings(path, "config.json")
    if config is None:
        return [
            f"--model_name_or_path {looked_up(path)}: found no config.json there; expected a checkpoint. Train one: "
            f"`sh train.sh`; or fetch the base model: {fetch('model')}"
        ]
    check_family(config, path)
    needed = ["tokenizer_config.json", "tokenizer.json"]  # tokenizer.model alone is read differently
    others = ("tokenizer_config.json", "chat_template.json", "preprocessor_config.json", "processor_config.json")
    *_, pixels, processor = (read_settings(path, name) for name in others)
    if (pixels := (processor or {}).get("image_processor", pixels)) is None:
        needed.append("preprocessor_config.json")
    size, side = (pixels or {}).get("size"), config["vision_config"].get("image_size")
    if side and {*(size.values() if isinstance(size, dict) else [size])} - {side, None}:
        return [f"{path}: found pictures of size {size}; expected image_size {side} of config.json: {fetch(path)}"]
    absent = [name for name in needed if not os.path.isfile(os.path.join(path, name))]
    return read_shards(path)[1] + [f"{path}: {name} is missing: {fetch(path, name)}" for name in absent]


def check_readable(file):
    """Raises UserError if it is a folder, a pipe or a device, too large or not ours to read: the libraries read it."""
    with contextlib.suppress(FileNotFoundError), open_regular(file) as opened:  # if it is needed, it is missed later
        if (size := os.fstat(opened.fileno()).st_size) > MAX_JSON:
            raise UserError(f"{file}: found {size:,} bytes; expected at most {MAX_JSON:,}; restore the file")


def adapter_problems(path, adapter):
    """As find_problems(), for the folder of an adapter with these settings."""
    base, file = base_of(path), f"{path}/adapter_config.json"
    if not os.path.isfile(os.path.join(base, "config.json")):
        return [
            f"{path}: found an adapter to the base model {base!r}, which is not there; expected that folder; put "
            f"it there, or write its new place into base_model_name_or_path of {file}"
        ]
    if adapter_config(base) is not None:
        return [
            f"{file}: found base_model_name_or_path {base}, an adapter itself; expected a checkpoint; merge it first"
        ]
    if strange := [key for key, value in adapter.items() if value and key not in LORA_KEYS.split()]:
        return [f"{file}: found {first_names(strange)}; expected LoRA without it; train the adapter without it"]
    shapes, problems = read_shards(path, "adapter_model")
    rank = adapter.get("r", 8)
    if wrong := [name for name, shape in shapes.items() if ".lora_A." in name and shape[:1] != (rank,)]:
        problems.append(f"{file}: found r = {rank}; expected that of {first_names(wrong)}; copy it from its run again")
    held, damaged = read_shards(base)
    if not damaged and not adapter.get("modules_to_save"):  # weights that trained whole; transformers 5 renames
        names = {name: re.sub(r"^model\.|(?<=vision_tower\.)vision_model\.", "", name) for name in held}
        held = {f"base_model.model.model.{names[name]}": shape for name, shape in held.items()}
        whole = [name for name in shapes if "lora_" not in name and ".base_layer." not in name]
        if wrong := [name for name in whole if held.get(name) != shapes[name]]:
            do = "copy adapter_model.safetensors from its run again"
            problems.append(f"{path}: found {first_names(wrong)}; expected names and shapes as in {base}; {do}")
    return problems + find_problems(base)


def read_shards(path, stem="model"):
    """-> ({parameter name: shape}, problems) from the headers of the safetensors files. Reads no weights."""
    index = os.path.join(path, f"{stem}.safetensors.index.json")
    shard_of, files = {}, [f"{stem}.safetensors"]  # parameter name -> file
    if os.path.exists(index):
        try:
            shard_of = family.check_settings(index, "model.safetensors.index.json").get("weight_map") or {}
        except UserError as error:
            return {}, [str(error)]
        if not (files := sorted(set(shard_of.values()))):
            return {}, [f"{index}: found no weight_map in it; expected the list of shards; download the file again"]
    shapes, problems = {}, []
    for name in files:
        file = os.path.join(path, name)
        try:
            header = read_header(file)
        except FileNotFoundError:
            problems.append(f"{file}: not found; expected {len(files)} file(s) of weights: {fetch(path, name)}")
        except UserError as error:
            problems.append(str(error))
        except ValueError as error:
            problems.append(f"{file}: found {error}; delete it and download it again: {fetch(path, name)}")
        else:
            shapes |= header
            if absent := [key for key in shard_of if shard_of[key] == name and key not in header]:
                problems.append(f"{file}: found no {first_names(absent)}; expected by {index}: {fetch(path, name)}")
    return shapes, problems


def read_header(file):
    """{parameter name: shape} of a safetensors file. Raises ValueError if it is no such file or is cut short."""
    with open_regular(file) as opened:
        start, size = opened.read(8), os.fstat(opened.fileno()).st_size
        if start == b"version ":
            raise ValueError("a Git LFS pointer instead of the weights (`git lfs pull` fetches them)")
        length = int.from_bytes(start, "little")
        if not 2 <= length <= min(size - 8, MAX_HEADER):
            raise ValueError(f"{size:,} bytes that are not safetensors, or cut short")
        try:
            header = json.loads(opened.read(length))
            header.pop("__metadata__", None)
            shapes = {name: tuple(map(operator.index, entry["shape"])) for name, entry in header.items()}
            ends = [operator.index(entry["data_offsets"][1]) for entry in header.values()]
        except (ValueError, RecursionError, AttributeError, TypeError, LookupError):
            raise ValueError(f"{size:,} bytes that are not safetensors") from None
    if size != (complete := 8 + length + max(ends, default=0)):
        raise ValueError(f"{size:,} bytes although its header says {complete:,}")
    return shapes


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


def within_limits(call, where, expected):
    """Calls it in a process of its own, as it may never end. Raises UserError if it raises anything or takes too much.

    It may take 5 s and 2 GiB of memory more than this process has, which it begins as a copy of.
    """
    import multiprocessing
    import resource

    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)

    def work():
        try:
            with open("/proc/self/statm") as file:
                most = int(file.read().split()[0]) * resource.getpagesize() + 2**31
            hard = resource.getrlimit(resource.RLIMIT_AS)[1]
            resource.setrlimit(resource.RLIMIT_AS, (most if hard < 0 else min(most, hard), hard))
            call()
            theirs.send(None)
        except Exception as error:
            theirs.send(repr(error)[:300])

    process = fork.Process(target=work, daemon=True)
    process.start()
    theirs.close()
    try:
        problem = ours.recv() if ours.poll(5) else "no end after 5 s"
    except EOFError:
        problem = "a crash"
    process.kill()
    process.join()
    if problem:
        raise UserError(f"{where}: found {problem}; expected {expected}; copy the file from its run again")


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
    with in_one_line(f"{path}/config.json"), unpartitioned_models(), torch.device("meta"):  # without memory
        model = model_class(config)(config)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found, _ = match_names(model, shapes)
    missing = [name for name in expected if name not in found]
    unused = ("position_ids", "inv_freq")  # parameters of older versions, which today's model computes
    unexpected = [found[name][0] for name in found if not (name in expected or name.endswith(unused))]
    for names, what in ((missing, "are missing"), (unexpected, "do not belong to the model")):
        if names:
            problems.append(f"{path}: {len(names)} parameters {what}: {first_names(names)}")
    for name, (file_name, shape) in found.items():
        if shape != expected.get(name, shape):
            problems.append(f"{path}: {file_name} has shape {list(shape)}; config.json expects {list(expected[name])}")
    if more := problems[5:]:
        problems[5:] = [f"{path}: {len(more)} more of these"]
    if problems:
        problems.append(f"{path}: the weights and config.json are not of one model; fetch both anew: {fetch(path)}")
    return problems
