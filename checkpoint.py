"""What a checkpoint folder holds, and how it is checked, read and written. Also takes LoRA adapters.

    python checkpoint.py model                           # is all there, and does it fit together? reads no weights
    python checkpoint.py sft-lora --merge sft-merged     # base + adapter -> a plain checkpoint

Reads what copies of llava-hf/llava-v1.6-mistral-7b-hf look like: as downloaded, older and newer snapshots, the hub's
cache with its links, ModelScope's copy, what transformers 5 saves. Writes the hub's form again: its file names, its
parameter names, 5 GB shards, and settings in both today's and yesterday's spelling, so that transformers 4.50 and
later, and what is built on them, read it too.
"""

import argparse
import contextlib
import functools
import json
import os
import re
import shutil
import sys

import config as settings
from config import UserError

HUB_NAME = "llava-hf/llava-v1.6-mistral-7b-hf"
SHARD_SIZE = "5GB"  # the hub's; transformers 5 would write 15 GB in one file
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
HUB_TEMPLATE = (  # for a copy that has no chat template: the hub's, without BOS, with a space after </s>
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ '<<SYS>>\n' + message['content'][0]['text'] + "
    "'\n<</SYS>>\n\n' }}{% elif message['role'] == 'user' %}{{ '[INST] ' }}{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{# Render all text next #}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] }}{% endfor %}{{' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'][0]['text'] + '</s> '}}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
# The language model's linear layers; the vision tower, the projector and lm_head stay as they are.
LORA_TARGETS = r".*language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


# --- checks: before anything slow, without torch ------------------------------------------------------------------


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


def read_json(file):
    try:
        with open(file, encoding="utf-8") as opened:
            return json.load(opened)
    except ValueError as error:
        raise UserError(f"{file}: found {error}; expected JSON; download the file again") from None


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
    if kind != "llava_next" or config.get("text_config", {}).get("model_type", "llama") not in ("mistral", "llama"):
        return [f"{path}: found model_type {kind!r} in config.json; expected 'llava_next': {fetch(path)}"]
    if "quantization_config" in config:
        return [
            f"{path}: found a quantized copy (quantization_config in config.json); expected the plain weights: "
            f"{fetch(path)}; --load_in_4bit quantizes them as they load"
        ]
    _, problems = read_shards(path)
    there = {name for name in os.listdir(path) if os.path.exists(os.path.join(path, name))}
    for name in (
        "tokenizer_config.json",
        "tokenizer.json",
    ):  # .model alone is read differently
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
    size = os.path.getsize(file)
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


@contextlib.contextmanager
def whole_models():
    """A model that is built in here is whole, not partitioned, even if ZeRO-3 is on."""
    from transformers.integrations import deepspeed

    kept, deepspeed._hf_deepspeed_config_weak_ref = deepspeed._hf_deepspeed_config_weak_ref, None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = kept


def check_weights(path):
    """-> a list of problems: shards missing or cut short; parameters missing, unexpected or of another shape.

    Compares the files' headers with the model that config.json describes, built without memory (meta device), through
    transformers' own renaming. Under ZeRO-3 transformers itself reports only missing ones. Seconds, reads no weights.
    """
    shapes, problems = read_shards(path)
    if problems:
        return problems
    import torch
    from transformers import AutoConfig, LlavaNextForConditionalGeneration
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    with whole_models(), torch.device("meta"):
        model = LlavaNextForConditionalGeneration(AutoConfig.from_pretrained(path))
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    rules = get_model_conversion_mapping(model)
    renaming = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    others = [rule for rule in rules if not isinstance(rule, WeightRenaming)]
    found = {}  # parameter name of the model -> (name in the file, shape)
    for name, shape in shapes.items():
        found[rename_source_key(name, renaming, others, model.base_model_prefix, expected)[0]] = name, shape
    # buffers of older versions that no longer are parameters
    unexpected = [found[n][0] for n in found if n not in expected and not n.endswith(("position_ids", "inv_freq"))]
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


# --- reading ------------------------------------------------------------------------------------------------------


def load_processor(path):
    """The checkpoint's processor (of an adapter: its base's) with the PIL image backend, torchvision or not.

    processor.chat_template is the checkpoint's own, mended where old copies have it wrong; training and scoring pass
    config.CHAT_TEMPLATE themselves. Old snapshots lack processor_config.json; config.json says the same.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoProcessor

    path = base_of(path)
    processor = AutoProcessor.from_pretrained(path)  # backend="pil" here would reach the tokenizer too
    processor.image_processor = AutoImageProcessor.from_pretrained(path, backend="pil")
    if processor.patch_size is None or processor.vision_feature_select_strategy is None:
        model_config = AutoConfig.from_pretrained(path)
        processor.patch_size = model_config.vision_config.patch_size
        processor.vision_feature_select_strategy = model_config.vision_feature_select_strategy
        processor.num_additional_image_tokens = 1  # CLIP's class token
    template = processor.chat_template
    if template is None:
        say(f"{path}: has no chat template; what is saved gets the hub's")
        processor.chat_template = HUB_TEMPLATE
    elif "\\s>" in template:
        say(f"{path}: its chat template ends answers with <\\s> (an old mistake); what is saved says </s>")
        processor.chat_template = re.sub(r"<\\+s>", "</s>", template)
    tokens = processor.tokenizer.tokenize("<image>\nx")
    if tokens[:2] != ["<image>", "▁"]:  # one token, and the ▁ that some rebuilt tokenizers drop after it
        files = "tokenizer.json tokenizer_config.json added_tokens.json"
        raise UserError(
            f"{path}: its tokenizer cuts '<image>' and a new line into {tokens}; expected '<image>', '▁', ... as the "
            f"model was trained on; fetch the tokenizer anew: {fetch(path, files)}"
        )
    return processor


def say(message):
    """On rank 0's stderr."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)


def load_weights(path, **options):
    """LlavaNextForConditionalGeneration from `path`; raises UserError unless every parameter is there and fits."""
    from transformers import LlavaNextForConditionalGeneration

    problems = check_weights(path)
    if problems:
        raise UserError("\n".join(problems))
    model, info = LlavaNextForConditionalGeneration.from_pretrained(path, output_loading_info=True, **options)
    wrong = {kind: sorted(info[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]}
    if wrong:
        raise UserError(f"{path}: found weights that do not fit config.json ({wrong}); download the checkpoint again")
    return model


def load_model(path, dtype="bfloat16"):
    """The checkpoint, or base and adapter, for inference on this process's device, without DeepSpeed."""
    import torch
    from accelerate import PartialState

    model = load_weights(base_of(path), dtype=getattr(torch, dtype), attn_implementation="sdpa")
    if adapter_config(path) is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, path)
    return model.eval().to(PartialState().device)


def load_for_training(model_args, args):
    """The checkpoint, partitioned over the ranks as it loads when ZeRO-3 is on; in 4 or 8 bit if asked. All ranks."""
    import torch
    from accelerate import PartialState
    from trl import get_quantization_config

    path, problems = model_args.model_name_or_path, []
    if model_args.dtype not in ("bfloat16", "float32"):
        problems.append(
            f"--dtype: found {model_args.dtype}; expected bfloat16 or float32 (nothing here scales the loss, which "
            "float16, the checkpoint's own type, would need)"
        )
    if adapter_config(path) is not None:
        problems.append(
            f"--model_name_or_path {path}: found an adapter; expected a plain checkpoint; go on with it by "
            f"--resume_from_checkpoint, or merge it first: `python checkpoint.py {path} --merge OUT`"
        )
    if model_args.load_in_4bit or model_args.load_in_8bit:
        if not model_args.use_peft:
            problems.append("--load_in_4bit, --load_in_8bit: quantized weights cannot be trained; add --use_peft")
        if args.deepspeed_plugin and args.deepspeed_plugin.zero_stage == 3:
            problems.append(
                "--load_in_4bit, --load_in_8bit: ZeRO-3 cannot partition quantized weights; add --config_file "
                "scripts/ddp.yaml"
            )
    if problems:
        raise UserError("\n".join(problems))
    quantization = get_quantization_config(model_args)
    options = {}
    if quantization is not None:
        quantization.llm_int8_skip_modules = ["vision_tower", "multi_modal_projector", "lm_head"]  # 4 bit reads it too
        options = {"quantization_config": quantization, "device_map": {"": PartialState().device}}
    model = load_weights(
        path,
        dtype=getattr(torch, model_args.dtype),
        attn_implementation=model_args.attn_implementation or "sdpa",
        **options,
    )
    # Under ZeRO-3 transformers keeps every renaming rule for the way back, a legacy one included that loading did not
    # use; saving would then write language_model.model.model.*, which only transformers itself reads again.
    model._weight_conversions = [c for c in model._weight_conversions if c.was_used()]
    model.config.use_cache = False  # of no use in training
    model.save_pretrained = functools.partial(model.save_pretrained, max_shard_size=SHARD_SIZE)
    return model


def lora_config(model_args):
    """peft's LoraConfig from the flags, or None; by default on the language model's linear layers alone."""
    from trl import get_peft_config

    config = get_peft_config(model_args)
    if config is not None and model_args.lora_target_modules is None and model_args.lora_target_parameters is None:
        config.target_modules = LORA_TARGETS
    return config


def describe_trainable(model):
    """-> a line: how many parameters train and which. Raises UserError if one trains beside what LoRA added."""
    numbers, kinds, strange = [0, 0], {}, []
    for name, value in model.named_parameters():
        count = getattr(value, "ds_numel", value.numel())  # ZeRO-3 leaves 0 elements in a partitioned parameter
        numbers[0] += count
        if value.requires_grad:
            numbers[1] += count
            short = re.sub(r"^base_model\.model\.|\.(default|weight)\b|lora_[A-Za-z_]*", "", name)
            kind = re.sub(r"\.\d+\.", ".*.", short).strip(".")
            kinds[kind] = kinds.get(kind, 0) + 1
            if "lora_" not in name and "modules_to_save" not in name and hasattr(model, "peft_config"):
                strange.append(name)
    if strange:
        raise UserError(f"--use_peft: {len(strange)} parameters beside the adapters would train: {some(strange)}")
    line = f"{numbers[1]:,} of {numbers[0]:,} parameters = {numbers[1] / numbers[0]:.2%}"
    return line + (f": {', '.join(f'{kind} ({n})' for kind, n in kinds.items())}" if len(kinds) < 40 else "")


# --- writing ------------------------------------------------------------------------------------------------------


def write_json(file, content):
    part = f"{file}.part"
    with open(part, "w", encoding="utf-8") as opened:
        json.dump(content, opened, indent=2, ensure_ascii=False)
        opened.write("\n")
    os.replace(part, file)


def write_hub_files(folder, source, processor):
    """Make of what transformers 5 saved in `folder` what the hub repository holds. Main process only.

    `source` is the folder the model was loaded from: its tokenizer files, which training does not change, are copied.
    Both spellings of each setting are written, for readers before and after transformers 5.
    """
    source = base_of(source)
    for name in TOKENIZER_FILES:
        if os.path.isfile(os.path.join(source, name)):
            shutil.copyfile(os.path.join(source, name), os.path.join(folder, name))
    write_tokenizer_settings(folder, processor)
    nested = read_json(os.path.join(folder, "processor_config.json"))
    pixels = nested.pop("image_processor") | {"processor_class": nested["processor_class"]}
    write_json(os.path.join(folder, "preprocessor_config.json"), dict(sorted(pixels.items())))
    write_json(os.path.join(folder, "processor_config.json"), nested)  # transformers 4.50 stops at a nested one
    write_json(os.path.join(folder, "chat_template.json"), {"chat_template": processor.chat_template})
    file = os.path.join(folder, "config.json")
    if os.path.isfile(file):  # an adapter has none
        config = read_json(file)
        for part in (config, config["text_config"], config["vision_config"]):
            if "dtype" in part:
                part["torch_dtype"] = part["dtype"]
        config["text_config"]["rope_theta"] = config["text_config"]["rope_parameters"]["rope_theta"]
        config.pop("use_cache", None)  # was off for training only
        write_json(file, config)


def write_tokenizer_settings(folder, processor):
    """tokenizer_config.json, special_tokens_map.json and added_tokens.json that readers of transformers 4 take."""
    tokenizer = processor.tokenizer
    file = os.path.join(folder, "tokenizer_config.json")
    config = read_json(file)
    if config.get("tokenizer_class") != "LlamaTokenizer":  # transformers 5 writes its own TokenizersBackend
        for name in ("backend", "is_local", "local_files_only"):
            config.pop(name, None)
        special = config.pop("model_specific_special_tokens", None) or {"image_token": processor.image_token}
        config |= {"tokenizer_class": "LlamaTokenizer", "extra_special_tokens": special, "legacy": True}
        write_json(file, config)
    if "added_tokens_decoder" not in config:
        config["added_tokens_decoder"] = {
            str(i): {key: getattr(token, key) for key in ("content", "lstrip", "normalized", "rstrip", "single_word")}
            | {"special": True}
            for i, token in sorted(tokenizer.added_tokens_decoder.items())
        }
        write_json(file, config)
    map_file, added_file = (os.path.join(folder, name) for name in ("special_tokens_map.json", "added_tokens.json"))
    if not os.path.isfile(map_file):
        flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        write_json(map_file, {name: {"content": getattr(tokenizer, name)} | flags for name in names})
    if not os.path.isfile(added_file):
        core = {"<unk>", "<s>", "</s>"}
        added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.content not in core}
        write_json(added_file, added)


def merge(adapter, out, dtype="bfloat16"):
    """Write base + adapter as a plain checkpoint to the folder `out`."""
    if adapter_config(adapter) is None:
        raise UserError(f"{adapter}: found no adapter_config.json; expected what `sh train.sh --use_peft` leaves")
    if os.path.exists(out) and os.listdir(out):
        raise UserError(f"--merge {out}: found files there; expected a new folder; name another one")
    require_checkpoint(adapter)
    model = load_model(adapter, dtype).merge_and_unload(safe_merge=True)
    processor = load_processor(adapter)
    model.save_pretrained(out, max_shard_size=SHARD_SIZE)
    processor.save_pretrained(out)
    write_hub_files(out, adapter, processor)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("path", help="checkpoint or adapter")
    parser.add_argument("--merge", metavar="OUT", help="write base + adapter to this new folder")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the merged weights")
    args = parser.parse_args()
    if args.merge:
        merge(args.path, args.merge, args.dtype)
        print(f"wrote {args.merge}. Next:\n    sh validation.sh --model_name_or_path {args.merge}")
        return
    require_checkpoint(args.path)
    problems = check_weights(base_of(args.path))
    if problems:
        raise UserError("\n".join(problems))
    shapes, _ = read_shards(base_of(args.path))
    print(f"{args.path}: nothing is missing; {len(shapes)} parameter tensors")


if __name__ == "__main__":
    settings.run(main)
