"""--vision_learning_rate, --projector_learning_rate: each part has its rate, in whatever way the model is trained.

That a resumed run is the same, and a changed rate is refused, is in test_survive.py.
"""

import ast
import re

import pytest
from peft import LoraConfig, get_peft_model

from animals.checkpoint.load import load_model
from animals.training.lora import LORA_TARGETS
from animals.training.parts import BASE, PARTS, belongs, freeze, parameter_groups, trains
from tests.test_rehearsal import command

RATES = "--vision_learning_rate 1e-4 --projector_learning_rate 5e-4 --lr_scheduler_type linear --warmup_steps 0"
SHORT = f"{RATES} --eval_strategy no --eval_on_start False --save_strategy no --max_steps 10"


@pytest.mark.parametrize(
    ("parts", "lora"),
    [(list(PARTS), False), (["vision", "projector"], True), (["language"], False), (["vision", "attention"], False)],
)
def test_every_trained_parameter_is_in_one_group(demo, parts, lora):
    model = load_model(demo.model, "float32")
    if lora:
        model = get_peft_model(model, LoraConfig(target_modules=LORA_TARGETS))
    freeze(model, parts, float32=False)
    decayed = {name for name, value in model.named_parameters() if value.ndim > 1}
    groups = parameter_groups(model, {"vision": 1e-4, "projector": 5e-4}, 1e-3, decayed, 0.01)
    rates = {"language": 1e-3, "attention": 1e-3, "projector": 5e-4, "vision": 1e-4}
    for full, value in model.named_parameters():
        name = full.removeprefix(BASE)
        assert value.requires_grad == (trains(name, parts, model.config) or ".lora_" in name)
        mine = [group for group in groups if any(value is other for other in group["params"])]
        assert len(mine) == value.requires_grad
        if mine:
            (part,) = [part for part in PARTS if belongs(name, [part])]
            assert (mine[0]["lr"], mine[0]["weight_decay"]) == (rates[part], 0.01 if full in decayed else 0.0)
    assert groups[0]["lr"] == (1e-3 if lora else max(rates[part] for part in parts))  # the library logs the first one


def test_without_rates_of_their_own_the_groups_are_the_librarys(demo):
    model = load_model(demo.model, "float32")
    assert len(parameter_groups(model, {"vision": None, "projector": 1e-3}, 1e-3, set(), 0.01)) == 1


@pytest.mark.parametrize(
    ("ranks", "flags", "parts"),
    [
        (2, "", ["projector", "vision"]),
        (2, "--config_file scripts/ddp.yaml --train_parts vision,projector", ["projector", "vision"]),
        (1, "--config_file scripts/ddp.yaml --use_peft", []),
        (2, "--use_peft --train_parts vision", ["vision"]),
    ],
)
def test_the_rates_follow_the_schedule(demo, run, tmp_path, ranks, flags, parts):
    done = run(command(demo, tmp_path / "sft", SHORT, flags), NUM_PROCESSES=ranks, code=0)
    logs = [ast.literal_eval(line) for line in re.findall(r"^\{'loss'.*\}$", done.output, re.M)]
    assert len(logs) == 10
    for step, log in enumerate(logs):
        left = 1 - step / 10  # linear, without warm-up
        for part, rate in (("vision", 1e-4), ("projector", 5e-4)):
            logged = log.get(f"learning_rate_{part}")
            assert logged is None if part not in parts else float(logged) == pytest.approx(rate * left, rel=1e-3)
    assert done.output.count("has no effect: the ") == 2 - len(parts)
