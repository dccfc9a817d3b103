"""--image_view whole: LLaVA-NeXT's first view as a plain llava model; read, trained, saved, scored."""

import json
import shutil
from pathlib import Path

import pytest
import replica
import torch
from PIL import Image
from safetensors.torch import load_file

from animals.checkpoint.check import check_files, check_weights
from animals.checkpoint.load import load_model, load_processor
from animals.checkpoint.tokens import STOCK, image_token_count, read_geometry, whole_view_gain
from animals.checkpoint.view import is_whole
from animals.scoring.scorer import Scorer
from animals.training import memory
from config import Config

ROOT = Path(__file__).resolve().parent.parent

STEPS = "--per_device_train_batch_size 4 --gradient_accumulation_steps 1 --logging_steps 1 --eval_strategy no"
WHOLE = "--image_view whole"


@pytest.fixture(scope="module")
def picture():
    return Image.effect_mandelbrot((300, 225), (-2, -1, 1, 1), 50).convert("RGB")


@pytest.fixture(scope="module")
def trained(hub, data, run, tmp_path_factory):
    """Two steps of 2-rank ZeRO-3 on whole views, a checkpoint after each."""
    out = tmp_path_factory.mktemp("whole") / "sft"
    command = f"sh train.sh {data} {STEPS} {WHOLE} --model_name_or_path {hub} --output_dir {out} --max_steps 2"
    command += " --save_steps 1"
    done = run(command, NUM_PROCESSES=2)
    assert done.code == 0, done.output[-3000:]
    assert "image tokens    576 to 576" in done.output
    return out, command


def test_pixels_and_features_are_those_of_the_base_view(hub, picture):
    tiles, whole = load_processor(hub), load_processor(hub, "whole")
    ours = whole.image_processor([picture], return_tensors="pt")["pixel_values"]  # [1, 3, 336, 336]
    theirs = tiles.image_processor([picture], return_tensors="pt")
    assert torch.equal(ours[0], theirs["pixel_values"][0, 0])
    next_model, model = load_model(hub, "float32"), load_model(hub, "float32", "whole")
    with torch.no_grad():
        base = next_model.model.vision_tower(theirs["pixel_values"][0, :1], output_hidden_states=True)
        base = next_model.model.multi_modal_projector(base.hidden_states[-2][:, 1:])
        features = model.get_image_features(ours).pooler_output[0]
    assert features.shape == (576, 64)
    assert (features - base[0]).abs().max() <= 1e-6


@pytest.mark.parametrize("size", [(300, 225), (1, 500), (4000, 3000)])
def test_every_picture_costs_576_tokens(hub, size):
    geometry = read_geometry(hub, "whole")
    assert image_token_count(*size, geometry) == 576
    (counted,) = load_processor(hub, "whole")._get_num_multimodal_tokens(image_sizes=[size[::-1]]).num_image_tokens
    assert counted == 576


def test_scorer_equals_teacher_forcing(hub, picture):
    scorer = Scorer(load_processor(hub, "whole"), Config(image_view="whole"))
    model = load_model(hub, "float32", "whole")
    scored = scorer.score(model, scorer.collate([picture, picture.rotate(90, expand=True)]))
    for row, one in zip(scored, (picture, picture.rotate(90, expand=True)), strict=True):
        for label, answer, found in zip(scorer.labels, scorer.answers, row, strict=True):
            text = scorer._text(label)
            batch = scorer.processor(images=[one], text=[text], add_special_tokens=False, return_tensors="pt")
            with torch.no_grad():
                log_p = model(**batch).logits[0, -len(answer) - 1 : -1].log_softmax(-1)
            assert log_p[range(len(answer)), answer].sum() == pytest.approx(found.item(), abs=1e-4)


def test_what_is_saved_is_a_plain_llava_checkpoint(trained, hub, picture):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    out, _ = trained
    task = json.loads((out / "task.json").read_text())
    assert task["image_view"] == "whole" and is_whole(out) and check_files(out) == [] and check_weights(out) == []
    shapes = replica.hub_shapes(replica.hub_config(2, 3, full_width=False))
    del shapes["image_newline"]
    assert {name: tuple(value.shape) for name, value in load_file(out / "model.safetensors").items()} == shapes
    model, info = LlavaForConditionalGeneration.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.config.image_seq_length == 576
    scorer = Scorer(load_processor(out, "whole"), Config(image_view="whole"))
    processor = AutoProcessor.from_pretrained(out)
    question = {"images": [picture], "text": [scorer._text("cat")], "return_tensors": "pt"}
    batch = processor(**question, add_special_tokens=False)
    assert type(processor).__name__ == "LlavaProcessor" and batch["pixel_values"].shape == (1, 3, 336, 336)
    inputs = scorer.processor(**question, add_special_tokens=False)
    with torch.no_grad():
        far = model.eval()(**batch).logits - load_model(out, "float32", "whole")(**inputs).logits
    assert far.abs().max() <= 1e-4


def test_resumed_run_is_the_same_to_the_bit(trained, run):
    out, command = trained
    before = (out / "model.safetensors").read_bytes()
    shutil.rmtree(out / "checkpoint-2")
    (out / "model.safetensors").unlink()
    done = run(command, NUM_PROCESSES=2)
    assert done.code == 0 and f"resuming from {out}/checkpoint-1" in done.output, done.output[-3000:]
    assert (out / "model.safetensors").read_bytes() == before


def test_commands_take_the_view_from_the_checkpoint(trained, hub, data, run, others_pictures, tmp_path):
    out, _ = trained
    score = f"sh validation.sh {data} --report_dir {tmp_path}/report --model_name_or_path"
    done = run(f"{score} {out}")
    assert done.code == 0 and json.loads(done.output.strip().splitlines()[-1])["n"] > 0, done.output[-3000:]
    assert json.loads((tmp_path / "report" / "sft" / "report.json").read_text())["image_view"] == "whole"
    cats = f"{others_pictures}/validation_data/cat"
    done = run(f"python test.py {cats} --model_name_or_path {out} --output {tmp_path}/names.csv")
    assert done.code == 0, done.output[-3000:]
    done = run(f"{score} {out} --image_view tiles")
    assert done.code == 2 and "image_newline" in done.output, done.output[-3000:]
    done = run(f"{score} {hub} {WHOLE}")  # the untuned model, seen whole: what does it cost on these pictures?
    assert done.code == 0 and json.loads(done.output.strip().splitlines()[-1])["n"] > 0, done.output[-3000:]


def test_the_user_is_told_what_the_whole_view_holds_and_saves(demo, run):
    """6 of 8 pictures of 300x225 and two larger ones, of the hub's tiles; and the line where a person looks."""
    assert whole_view_gain([(300, 225)] * 6 + [(640, 480)] * 2, STOCK) == (
        "6 of 8 pictures (75%) have no more pixels than the whole view, 336 x 336; --image_view whole takes 2.8 times "
        "fewer tokens: 576 a picture instead of 1,611"
    )
    done = run(
        f"python data_process_utils.py --input_dir {demo.input} --temp_dir {demo.cache} "
        f"--model_name_or_path {demo.model}"
    )
    assert done.code == 0 and "the whole view, 96 x 96; --image_view whole takes" in done.output, done.output


def test_plan_at_the_hubs_size():
    """8 x 2 on 4 x 24 GiB without activation offload; the projector alone, whole on a card of 24 GiB."""
    zero3 = memory.load_zero3(ROOT / "scripts" / "zero3.json")
    config = memory.load_config(ROOT / "tests" / "helpers" / "hub_config.json", "whole")
    sizes = 4, 8, 2, (576, 576)
    assert memory.plan(config, zero3, *sizes)["peaks"]["largest"] < 22.5
    projector = memory.plan(config, zero3, *sizes, method="ddp", parts=["projector"])
    assert projector["trained"] == 20_979_712 and projector["peaks"]["largest"] < 22.5
    assert projector["resident"] == pytest.approx(
        (2 * projector["parameters"] + 8 * projector["trained"]) / 2**30, rel=1e-3
    )
