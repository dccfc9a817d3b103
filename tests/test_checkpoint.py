"""The real checkpoint's layout, on a narrow replica of it (replica.py): read, checked, trained, saved, read.

The slow half is in tests/helpers: variants.py trains every variant, second_reader.sh reads what is saved with
transformers of the past.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys

import numpy
import pytest
import replica
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from animals.checkpoint.check import check_files, check_weights, match_names
from animals.checkpoint.family import HUB_NAME, model_class, model_config
from animals.checkpoint.load import load_for_training, load_model, load_processor
from animals.command import UserError
from animals.files import read_json
from animals.scoring.scorer import Scorer
from config import Config
from train import parse

# What a download holds beside weights, README and .gitattributes.
HUB_FILES = {*replica.HUB_FILES, "config.json", "tokenizer.json", "tokenizer.model"}
SHAPES = replica.hub_shapes(replica.hub_config(2, 3, full_width=False))
PICTURE = Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (225, 300, 3), dtype=numpy.uint8))


def score(folder):
    """PICTURE's token ids and the labels' log-probabilities in float32."""
    scorer = Scorer(load_processor(folder), Config())
    batch = scorer.collate([PICTURE])
    return batch["input_ids"].clone(), scorer.score(load_model(folder, "float32"), batch)


@pytest.fixture(scope="module")
def hubs_scores(hub):
    return score(hub)


def settings_of(*flags):
    _, args, model_args, _ = parse(["--output_dir", "x", *flags])
    return model_args, args


def test_replica_has_the_hubs_small_files_to_the_byte(hub):
    sizes = {name: (hub / name).stat().st_size for name in HUB_FILES}
    assert sizes["added_tokens.json"] == 41 and sizes["chat_template.json"] == 694
    assert sizes["generation_config.json"] == 116 and sizes["special_tokens_map.json"] == 552
    assert sizes["preprocessor_config.json"] == 772
    assert 1_750_000 < sizes["tokenizer.json"] < 1_850_000 and 492_500 < sizes["tokenizer.model"] < 493_500
    shards = sorted(hub.glob("model-*-of-00004.safetensors"))
    assert len(shards) == 4 and {value.dtype for value in load_file(shards[0]).values()} == {torch.float16}


def test_7b_has_the_hubs_names_and_shapes_both_ways():
    """All of the model on meta: what we would save has the hub's 687 names, and the model knows each of them."""
    from transformers.core_model_loading import revert_weight_conversion

    config = model_config(replica.HERE / "hub_config.json")
    with torch.device("meta"):
        model = model_class(config)(config)
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    assert sum(map(math.prod, shapes.values())) == 7_566_747_648
    found, rules = match_names(model, replica.hub_shapes(replica.hub_config()))
    assert {name: shape for name, (_, shape) in found.items()} == shapes
    model._weight_conversions = [rule for rule in rules if rule.was_used()]  # as load_for_training leaves it
    saved = {name: tuple(value.shape) for name, value in revert_weight_conversion(model, model.state_dict()).items()}
    assert len(saved) == 687 and saved == replica.hub_shapes(replica.hub_config())


@pytest.mark.parametrize("name", replica.VARIANTS)
def test_variant_gives_the_same_tokens_and_scores(hub, hubs_scores, tmp_path, capfd, name):
    folder = replica.build_variant(hub, tmp_path / name, name)
    assert check_files(folder) == [] and check_weights(folder) == []
    assert all(map(torch.equal, score(folder), hubs_scores))
    processor, chat = load_processor(folder), Config().conversation("cat")
    assert (processor.chat_template == replica.CHAT_TEMPLATE) == (name != "no_template")
    for turns in (chat, chat[:1]):
        templates = (processor.chat_template, replica.CHAT_TEMPLATE)
        ours, hubs = (processor.apply_chat_template(turns, chat_template=t, tokenize=False) for t in templates)
        assert ours.rstrip() == hubs.rstrip()
    printed = capfd.readouterr().err
    assert ("an old mistake" in printed) == (name == "old_template")
    assert ("has no chat template" in printed) == (name == "no_template")


@pytest.mark.parametrize("name", replica.BROKEN)
def test_tokenizer_model_alone_is_refused_by_name(hub, tmp_path, name):
    folder = replica.build_variant(hub, tmp_path / name, name)
    problems = "\n".join(check_files(folder))
    assert f"tokenizer.json is missing: `hf download {HUB_NAME} tokenizer.json --local-dir {folder}" in problems


def change_shard(folder, name, value=None):
    """Set a parameter in the first shard and in the index; None removes it."""
    index = folder / "model.safetensors.index.json"
    values = {key: old for key, old in (load_file(folder / ONE) | {name: value}).items() if old is not None}
    save_file(values, folder / ONE, metadata={"format": "pt"})
    others = {key: shard for key, shard in read_json(index)["weight_map"].items() if shard != ONE}
    replica.dump(index, {"metadata": {}, "weight_map": others | dict.fromkeys(values, ONE)})


def change_config(folder, **changes):
    replica.dump(folder / "config.json", replica.hub_config(2, 3, full_width=False) | changes)


ONE, TWO, THREE = (f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3))
EXTRA = "vision_tower.extra", torch.zeros(3)
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4920000000\n"
DAMAGE = {  # what happens to a folder -> what is said
    "no shard": (lambda f: (f / TWO).unlink(), rf"{TWO}: not found; .*hf download \S+ {TWO}"),
    "cut short": (
        lambda f: os.truncate(f / THREE, (f / THREE).stat().st_size - 100),
        rf"{THREE}: found [\d,]+ bytes although its header says [\d,]+; delete",
    ),
    "pointer": (lambda f: (f / TWO).write_text(LFS_POINTER), rf"{TWO}: found a Git LFS pointer"),
    "no weights": (lambda f: [x.unlink() for x in f.glob("model*")], r"model.safetensors: not found"),
    "missing": (lambda f: change_shard(f, "image_newline"), r"1 parameters are missing: model.image_newline"),
    "unexpected": (lambda f: change_shard(f, *EXTRA), r"1 parameters do not belong to the model: vision_tower.extra"),
    "mismatched": (
        lambda f: change_shard(f, "image_newline", torch.zeros(65)),
        r"image_newline has shape \[65\]; config.json expects \[64\]",
    ),
    "foreign": (
        lambda f: change_config(f, model_type="llava_mistral"),
        r"found model_type 'llava_mistral' in config.json; expected 'llava_next' or 'llava': `hf download",
    ),
    "quantized": (lambda f: change_config(f, quantization_config={}), r"found a quantized copy .*--load_in_4bit"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_before_the_weights_load(hub, tmp_path, damage):
    folder, (change, message) = shutil.copytree(hub, tmp_path / "model"), DAMAGE[damage]
    change(folder)
    problems = "\n".join(check_files(folder) or check_weights(folder))
    assert re.search(message, problems), problems


@pytest.mark.parametrize("kind", ["llava_next", "llava"])  # llava-v1.6-vicuna-7b-hf, llava-1.5-7b-hf
@pytest.mark.parametrize("text", [{"model_type": "llama", "_name_or_path": "lmsys/vicuna-7b-v1.5"}, {}])
def test_vicuna_is_refused_in_one_line(hub, tmp_path, kind, text):
    """transformers takes a text_config without model_type for a llama; the hub's says mistral."""
    replica.dump(tmp_path / "config.json", replica.hub_config() | {"model_type": kind, "text_config": text})
    [problem] = check_files(tmp_path)
    assert "found the language model 'llama'" in problem and "Vicuna" in problem and "expected 'mistral'" in problem


def test_checking_files_imports_no_torch(hub):
    code = "import sys, animals.checkpoint.check as c; print(c.check_files(sys.argv[1]), 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code, hub], capture_output=True, text=True, check=True).stdout
    assert out == "[] False\n"


def test_checking_weights_sees_all_shapes_under_zero3(hub):
    """And why compat.unpartitioned_models is there: else the vision tower has empty shapes, or cannot be built."""
    code = """
import contextlib, sys
import deepspeed.ops
from transformers.integrations import HfDeepSpeedConfig
from animals.checkpoint import check
from animals.command import UserError
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # half a minute of compiling
alive = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
assert check.check_weights(sys.argv[1]) == []
check.unpartitioned_models = contextlib.nullcontext
try:
    assert check.check_weights(sys.argv[1]) != []
except UserError as error:
    assert "NotImplementedError" in str(error)
print("seen")
"""
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    command = [sys.executable, "-c", code, str(hub)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ranks})
    assert done.stdout.strip().endswith("seen"), done.stderr[-2000:]


@pytest.fixture(scope="module")
def trained(hub, data, run, tmp_path_factory):
    """The old template, links as in the hub's cache, strange files in it; 2 steps."""
    tmp = tmp_path_factory.mktemp("trained")
    model = replica.build_variant(hub, tmp / "model", "old_template")
    for name in ("tricks.py", "training_args.bin", "checkpoint-7/config.json", ".cache/huggingface/download/x"):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text("nothing that training needs")
    replica.hub_cache(model)
    steps = "--max_steps 2 --save_strategy no --per_device_train_batch_size 1 --gradient_accumulation_steps 1"
    done = run(f"sh train.sh {data} {steps} --model_name_or_path {model} --output_dir {tmp}/sft", NUM_PROCESSES=2)
    assert done.code == 0 and done.output.count("an old mistake") == 1, done.output[-3000:]
    return tmp / "sft"


def test_saved_folder_is_the_hubs(trained, hub, arithmetic):
    there = {path.name for path in trained.iterdir()}
    assert there == HUB_FILES | {"model.safetensors", "task.json", "run.json", "README.md"}
    values = load_file(trained / "model.safetensors")
    assert {name: tuple(value.shape) for name, value in values.items()} == SHAPES
    assert {value.dtype for value in values.values()} == {getattr(torch, arithmetic)}, "not fp16 of config.json"
    assert check_files(trained) == [] and check_weights(trained) == []
    for name in HUB_FILES - {"config.json"}:
        assert json_or_bytes(trained / name) == json_or_bytes(hub / name), name
    config, before = (read_json(folder / "config.json") for folder in (trained, hub))
    for part in (before, before["text_config"], before["vision_config"]):
        part |= {"dtype": arithmetic, "torch_dtype": arithmetic}
    numbers = {label: i for i, label in enumerate(Config().labels)}
    assert config == before | {"label2id": numbers, "id2label": {str(i): label for label, i in numbers.items()}}


def json_or_bytes(path):
    return read_json(path) if path.suffix == ".json" else path.read_bytes()


def test_bare_transformers_and_its_pipeline_read_it(trained, tmp_path):
    """In a process that imports nothing of ours: 0 missing, 0 unexpected, and the pipeline says what the model says."""
    PICTURE.save(tmp_path / "a.png")
    code = """
import json, sys
import torch
from transformers import AutoProcessor, LlavaNextForConditionalGeneration, pipeline
folder, file = sys.argv[1:]
model, info = LlavaNextForConditionalGeneration.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]), info
processor = AutoProcessor.from_pretrained(folder)
question = [{"type": "image", "url": file}, {"type": "text", "text": "What animal is this?"}]
chat = [{"role": "user", "content": question}]
inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
assert (inputs["input_ids"] == 1).sum() == 1
ours = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1]:]
pipe = pipeline("image-text-to-text", model=folder, dtype=torch.float32)
theirs = pipe(text=chat, return_full_text=False, generate_kwargs={"max_new_tokens": 4, "do_sample": False})
print(json.dumps([processor.decode(ours, skip_special_tokens=True), theirs[0]["generated_text"]]))
"""
    command = [sys.executable, "-c", code, str(trained), str(tmp_path / "a.png")]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    ours, theirs = json.loads(done.stdout.splitlines()[-1])
    assert ours.strip() == theirs.strip() != ""


def test_what_zero3_cannot_train_is_said_before_the_weights_load(hub, data, run, tmp_path):
    """transformers says nothing of an unexpected parameter under ZeRO-3."""
    folder = shutil.copytree(hub, tmp_path / "model")
    change_shard(folder, *EXTRA)
    done = run(f"sh train.sh {data} --model_name_or_path {folder} --output_dir {tmp_path}/sft")
    assert done.code == 2 and "do not belong to the model: vision_tower.extra" in done.output, done.output[-2000:]
    assert "Traceback" not in done.output


def test_type_of_the_checkpoint_is_never_taken_over(hub, arithmetic):
    model_args, args = settings_of("--model_name_or_path", str(hub))
    assert load_for_training(model_args, args).dtype == getattr(torch, arithmetic)
    for model_args.dtype in ("auto", "float16"):  # as on a GPU; on a CPU all is float32, whatever was asked for
        with pytest.raises(UserError, match=f"--dtype: found {model_args.dtype}; expected bfloat16 or float32"):
            load_for_training(model_args, args)


def test_big_models_are_cut_into_the_hubs_shards(hub, tmp_path):
    """5 GB per file, which a narrow model does not reach: the limit is looked at, then lowered."""
    model = load_for_training(*settings_of("--model_name_or_path", str(hub)))
    assert model.save_pretrained.keywords == {"max_shard_size": "5GB"}
    model.save_pretrained.keywords["max_shard_size"] = "2MB"
    model.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"].keys() == SHAPES.keys()
