"""The plain llava checkpoint of scripts/whole_view.py: read, trained, saved. test_task.py scores with it."""

import json
import shutil
import sys

import pytest
import replica
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from animals.checkpoint.check import check_files, check_weights
from animals.checkpoint.image_tokens import STOCK, image_token_count, read_geometry
from animals.checkpoint.load import load_model, load_processor
from animals.command import UserError
from animals.scoring.scorer import Scorer
from config import Config
from data_process_utils import describe_whole_view
from scripts import whole_view

PICTURE = Image.effect_mandelbrot((300, 225), (-2, -1, 1, 1), 50).convert("RGB")


@pytest.fixture(scope="module")
def whole(hub, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "model-whole"
    whole_view.write_whole_view(hub, out)
    return out


def read_weights(folder):
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def read_bare(folder):
    """Weights in the files, model and processor as bare transformers reads them: nothing is missing, nothing left."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    assert check_files(folder) == [] and check_weights(folder) == []
    weights, shapes = read_weights(folder), replica.hub_shapes(replica.hub_config(2, 3, full_width=False))
    del shapes["image_newline"]
    assert {name: tuple(value.shape) for name, value in weights.items()} == shapes
    model, info = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    processor = AutoProcessor.from_pretrained(folder)
    assert model.config.image_seq_length == 576 and type(processor).__name__ == "LlavaProcessor"
    return weights, model.eval(), processor


@pytest.mark.parametrize("name", ["transformers_5", "hub_cache", "without_processor_config"])
def test_only_the_shard_with_image_newline_is_written_again(hub, tmp_path, capsys, monkeypatch, name):
    source, out = replica.build_variant(hub, tmp_path / "model", name), tmp_path / "whole"
    monkeypatch.setattr(sys, "argv", ["whole_view.py", str(source), str(out)])
    whole_view.main()
    assert f"Next:\n    sh train.sh --model_name_or_path {out}" in capsys.readouterr().out
    shards = sorted(file.name for file in source.glob("*.safetensors"))
    assert [shard for shard in shards if not (out / shard).samefile(source / shard)] == shards[:1]
    before, (weights, _, _) = read_weights(source), read_bare(out)
    assert all(value.dtype == torch.float16 and torch.equal(value, before[key]) for key, value in weights.items())
    if len(shards) > 1:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in weights.values())


def test_killed_in_the_middle_it_is_no_checkpoint(hub, whole, tmp_path, monkeypatch):
    """config.json comes last. A folder with files, a plain LLaVA and an adapter are refused in one line."""
    monkeypatch.setattr(whole_view, "whole_view_config", lambda config: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        whole_view.write_whole_view(hub, tmp_path / "out")
    assert "found no config.json there; expected a checkpoint" in check_files(tmp_path / "out")[0]
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(hub)}))
    save_file({}, tmp_path / "adapter_model.safetensors")
    for source, message in (
        (hub, "out: found files there; expected a new or empty folder; delete it, or name another one"),
        (whole, "found a plain LLaVA, which sees the whole view already; expected LLaVA-NeXT"),
        (tmp_path, "found an adapter; expected a checkpoint; merge it first: scripts/merge_lora.py"),
    ):
        with pytest.raises(UserError, match=message):
            whole_view.write_whole_view(source, tmp_path / "out")


def test_pixels_features_and_tokens_are_those_of_the_base_view(hub, whole):
    processor = load_processor(whole)
    ours = processor.image_processor([PICTURE], return_tensors="pt")["pixel_values"]  # [1, 3, 336, 336]
    theirs = load_processor(hub).image_processor([PICTURE], return_tensors="pt")["pixel_values"]
    assert torch.equal(ours[0], theirs[0, 0])
    tiles_model, model = load_model(hub, "float32").model, load_model(whole, "float32")
    with torch.no_grad():
        base = tiles_model.vision_tower(theirs[0, :1], output_hidden_states=True).hidden_states[-2][:, 1:]
        features = model.get_image_features(ours).pooler_output[0]  # [576, 64]
        assert (features - tiles_model.multi_modal_projector(base)[0]).abs().max() <= 1e-6
    for size in ((300, 225), (1, 500), (4000, 3000)):
        (counted,) = processor._get_num_multimodal_tokens(image_sizes=[size[::-1]]).num_image_tokens
        assert counted == image_token_count(*size, read_geometry(whole)) == len(features) == 576


@pytest.mark.slow
def test_trained_it_stays_a_plain_llava_and_resumes_to_the_bit(whole, data, run, tmp_path):
    """Two steps of 2-rank ZeRO-3, a checkpoint after each; then the second one again."""
    out = tmp_path / "sft"
    command = f"sh train.sh {data} --model_name_or_path {whole} --output_dir {out} --per_device_train_batch_size 4 "
    command += "--gradient_accumulation_steps 1 --eval_strategy no --max_steps 2 --save_steps 1"
    done = run(command, NUM_PROCESSES=2)
    assert done.code == 0 and "image tokens    576 to 576" in done.output, done.output[-3000:]
    _, model, processor = read_bare(out)
    scorer = Scorer(load_processor(out), Config())
    question = {"images": [PICTURE], "text": [scorer._text("cat")], "return_tensors": "pt", "add_special_tokens": False}
    with torch.no_grad():
        theirs = model(**processor(**question)).logits
        ours = load_model(out, "float32")(**scorer.processor(**question)).logits
    assert (ours - theirs).abs().max() <= 1e-4
    before = (out / "model.safetensors").read_bytes()
    shutil.rmtree(out / "checkpoint-2")
    (out / "model.safetensors").unlink()
    done = run(command, NUM_PROCESSES=2)
    assert done.code == 0 and f"resuming from {out}/checkpoint-1" in done.output, done.output[-3000:]
    assert (out / "model.safetensors").read_bytes() == before


def test_the_user_is_told_what_the_whole_view_holds_and_saves(demo, run):
    """6 of 8 pictures of 300x225 and two larger ones, of the hub's tiles; and the line where a person looks."""
    assert describe_whole_view([(300, 225)] * 6 + [(640, 480)] * 2, STOCK) == (
        "6 of 8 pictures (75%) have no more pixels than the whole view, 336 x 336; it takes 2.8 times fewer tokens, "
        "576 per picture instead of 1,611 (made by scripts/whole_view.py)"
    )
    flags = f"--input_dir {demo.input} --temp_dir {demo.cache} --model_name_or_path {demo.model}"
    done = run(f"python data_process_utils.py {flags}")
    assert done.code == 0 and "the whole view, 96 x 96; it takes" in done.output, done.output
