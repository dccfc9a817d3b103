"""The whole view: LLaVA-NeXT's first view as a plain llava checkpoint; written, read, trained, saved, scored."""

import json
import shutil
import sys

import pytest
import replica
import torch
from PIL import Image
from safetensors.torch import load_file

from animals.checkpoint.check import check_files, check_weights
from animals.checkpoint.load import load_model, load_processor
from animals.checkpoint.tokens import STOCK, describe_whole_view, image_token_count, read_geometry
from animals.command import UserError
from animals.scoring.scorer import Scorer
from config import Config
from scripts import whole_view

STEPS = "--per_device_train_batch_size 4 --gradient_accumulation_steps 1 --logging_steps 1 --eval_strategy no"


@pytest.fixture(scope="module")
def picture():
    return Image.effect_mandelbrot((300, 225), (-2, -1, 1, 1), 50).convert("RGB")


@pytest.fixture(scope="module")
def whole(hub, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "model-whole"
    whole_view.write_whole_view(hub, out)
    return out


@pytest.fixture(scope="module")
def trained(whole, data, run, tmp_path_factory):
    """Two steps of 2-rank ZeRO-3 on whole views, a checkpoint after each."""
    out = tmp_path_factory.mktemp("trained") / "sft"
    command = f"sh train.sh {data} {STEPS} --model_name_or_path {whole} --output_dir {out} --max_steps 2 --save_steps 1"
    done = run(command, NUM_PROCESSES=2)
    assert done.code == 0, done.output[-3000:]
    assert "image tokens    576 to 576" in done.output
    return out, command


def assert_plain_llava(folder, capfd):
    """All but image_newline is there, and bare transformers misses nothing and complains of nothing."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    assert check_files(folder) == [] and check_weights(folder) == []
    shapes = replica.hub_shapes(replica.hub_config(2, 3, full_width=False))
    del shapes["image_newline"]
    saved = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    assert {name: tuple(value.shape) for values in saved for name, value in values.items()} == shapes
    capfd.readouterr()
    model, info = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert "image_newline" not in capfd.readouterr().err and model.config.image_seq_length == 576
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor).__name__ == "LlavaProcessor"
    return model.eval(), processor


@pytest.mark.parametrize("name", [None, "transformers_5", "hub_cache", "without_processor_config"])
def test_written_once_and_shares_the_other_shards(hub, tmp_path, capfd, monkeypatch, name):
    source = replica.build_variant(hub, tmp_path / "model", name) if name else hub
    out = tmp_path / "whole"
    monkeypatch.setattr(sys, "argv", ["whole_view.py", str(source), str(out)])
    whole_view.main()
    assert f"Next:\n    sh train.sh --model_name_or_path {out}" in capfd.readouterr().out
    assert_plain_llava(out, capfd)
    shards = [file.name for file in source.glob("*.safetensors")]
    assert {name for name in shards if not (out / name).samefile(source / name)} == {min(shards)}
    values = {key: value for file in out.glob("*.safetensors") for key, value in load_file(file).items()}
    assert {value.dtype for value in values.values()} == {torch.float16}
    before = {key: value for file in source.glob("*.safetensors") for key, value in load_file(file).items()}
    assert all(torch.equal(value, before[key]) for key, value in values.items())
    if name is None:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in values.values())
        assert index["weight_map"].keys() == values.keys()


def test_killed_in_the_middle_it_is_no_checkpoint(hub, whole, tmp_path, monkeypatch):
    """config.json comes last; a folder with files, a plain LLaVA and an adapter are refused in one line."""
    monkeypatch.setattr(whole_view, "whole_view_config", lambda config: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        whole_view.write_whole_view(hub, tmp_path / "out")
    assert "found no config.json there; expected a checkpoint" in check_files(tmp_path / "out")[0]
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(hub)}))
    shutil.copy(next(whole.glob("*.safetensors")), tmp_path / "adapter_model.safetensors")
    for source, message in (
        (hub, "out: found files there; expected a new or empty folder; delete it, or name another one"),
        (whole, "found a plain LLaVA, which sees the whole view already; expected LLaVA-NeXT"),
        (tmp_path, "found an adapter; expected a checkpoint; merge it first: scripts/merge_lora.py"),
    ):
        with pytest.raises(UserError, match=message):
            whole_view.write_whole_view(source, tmp_path / "out")


def test_pixels_and_features_are_those_of_the_base_view(hub, whole, picture):
    ours = load_processor(whole).image_processor([picture], return_tensors="pt")["pixel_values"]  # [1, 3, 336, 336]
    theirs = load_processor(hub).image_processor([picture], return_tensors="pt")
    assert torch.equal(ours[0], theirs["pixel_values"][0, 0])
    tiles_model, model = load_model(hub, "float32"), load_model(whole, "float32")
    with torch.no_grad():
        base = tiles_model.model.vision_tower(theirs["pixel_values"][0, :1], output_hidden_states=True)
        base = tiles_model.model.multi_modal_projector(base.hidden_states[-2][:, 1:])
        features = model.get_image_features(ours).pooler_output[0]
    assert features.shape == (576, 64)
    assert (features - base[0]).abs().max() <= 1e-6


@pytest.mark.parametrize("size", [(300, 225), (1, 500), (4000, 3000)])
def test_every_picture_takes_576_tokens(whole, size):
    assert image_token_count(*size, read_geometry(whole)) == 576
    (counted,) = load_processor(whole)._get_num_multimodal_tokens(image_sizes=[size[::-1]]).num_image_tokens
    assert counted == 576


def test_scorer_equals_teacher_forcing(whole, picture):
    scorer, model = Scorer(load_processor(whole), Config()), load_model(whole, "float32")
    pictures = [picture, picture.rotate(90, expand=True)]
    for row, one in zip(scorer.score(model, scorer.collate(pictures)), pictures, strict=True):
        for label, answer, found in zip(scorer.labels, scorer.answers, row, strict=True):
            text = scorer._text(label)
            batch = scorer.processor(images=[one], text=[text], add_special_tokens=False, return_tensors="pt")
            with torch.no_grad():
                log_p = model(**batch).logits[0, -len(answer) - 1 : -1].log_softmax(-1)
            assert log_p[range(len(answer)), answer].sum() == pytest.approx(found.item(), abs=1e-4)


def test_what_is_saved_is_a_plain_llava_checkpoint(trained, picture, capfd):
    out, _ = trained
    model, processor = assert_plain_llava(out, capfd)
    scorer = Scorer(load_processor(out), Config())
    question = {"images": [picture], "text": [scorer._text("cat")], "return_tensors": "pt"}
    batch, inputs = (each(**question, add_special_tokens=False) for each in (processor, scorer.processor))
    assert batch["pixel_values"].shape == (1, 3, 336, 336)
    with torch.no_grad():
        difference = model(**batch).logits - load_model(out, "float32")(**inputs).logits
    assert difference.abs().max() <= 1e-4


def test_resumed_run_is_the_same_to_the_bit(trained, run):
    out, command = trained
    before = (out / "model.safetensors").read_bytes()
    shutil.rmtree(out / "checkpoint-2")
    (out / "model.safetensors").unlink()
    done = run(command, NUM_PROCESSES=2)
    assert done.code == 0 and f"resuming from {out}/checkpoint-1" in done.output, done.output[-3000:]
    assert (out / "model.safetensors").read_bytes() == before


def test_commands_take_the_view_from_the_checkpoint(trained, whole, data, run, others_pictures, tmp_path):
    out, _ = trained
    for folder in (out, whole):  # the untuned model in the whole view too: what does it lose on these pictures?
        done = run(f"sh validation.sh {data} --report_dir {tmp_path}/report --model_name_or_path {folder}")
        assert done.code == 0 and json.loads(done.output.strip().splitlines()[-1])["n"] > 0, done.output[-3000:]
    cats = f"{others_pictures}/validation_data/cat"
    done = run(f"python test.py {cats} --model_name_or_path {out} --output {tmp_path}/names.csv")
    assert done.code == 0, done.output[-3000:]


def test_the_user_is_told_what_the_whole_view_holds_and_saves(demo, run):
    """6 of 8 pictures of 300x225 and two larger ones, of the hub's tiles; and the line where a person looks."""
    assert describe_whole_view([(300, 225)] * 6 + [(640, 480)] * 2, STOCK) == (
        "6 of 8 pictures (75%) have no more pixels than the whole view, 336 x 336; it takes 2.8 times fewer tokens, "
        "576 per picture instead of 1,611 (made by scripts/whole_view.py)"
    )
    done = run(
        f"python data_process_utils.py --input_dir {demo.input} --temp_dir {demo.cache} "
        f"--model_name_or_path {demo.model}"
    )
    assert done.code == 0 and "the whole view, 96 x 96; it takes" in done.output, done.output
