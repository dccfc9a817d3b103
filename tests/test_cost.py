"""benchmarks/cost.py: operations counted right, time in proportion, assumptions that say where they come from."""

import argparse
import copy

import pytest

from animals.training import memory as memory_plan
from benchmarks import cost, flops
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def args():
    values = {name: value for name, value, _ in cost.ASSUMPTIONS}
    values |= {
        "model_name_or_path": str(ROOT / "tests" / "helpers" / "hub_config.json"),
        "pictures": 14308,
        "effective_batch": 64,
    }
    return argparse.Namespace(**values)


@pytest.fixture(scope="module")
def small():
    config = copy.deepcopy(memory_plan.load_config(ROOT / "tests" / "helpers" / "hub_config.json"))
    config.text_config.update({"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5})
    config.text_config.update({"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 99})
    config.vision_config.update({"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6})
    config.vision_config.update({"num_attention_heads": 4})
    return config


@pytest.mark.parametrize("options", [{}, {"frozen": True}, {"training": False}])
def test_extrapolated_count_is_the_count_of_every_layer(small, options):
    assert flops.count(small, 300, 3, **options) == flops.count_layers(small, 5, 6, 300, 3, **options)


def test_operations_of_the_real_model_are_near_the_rule_of_thumb(args):
    """8 x parameters x tokens: forward 2, recomputed 2, backward 4; attention and the vision tower add to it."""
    tokens, full = cost.picture_cost(args.model_name_or_path, "stock", (300, 225), False)
    _, lora = cost.picture_cost(args.model_name_or_path, "stock", (300, 225), True)
    language = 6.98e9  # parameters of Mistral's 32 layers
    assert tokens == 1368
    assert 1.0 < full / (8 * language * (tokens + memory_plan.TEXT_TOKENS)) < 1.1
    assert 0.7 < lora / full < 0.76  # 6 of 8, and no backward through the vision tower


def test_hours_follow_pictures_and_gpus(args):
    def hours(gpus, **more):
        changed = argparse.Namespace(**{**vars(args), **more})
        return cost.epoch(changed, "stock", (300, 225), "full", "4090", gpus, 1)

    four, eight = hours(4), hours(8)
    assert 0 < four["overlapped"] < four["apart"] < 2 * four["overlapped"] + 1e-9
    assert hours(4, pictures=143080)["apart"] / four["apart"] == pytest.approx(10, rel=0.01)
    assert eight["step"]["compute"] == pytest.approx(four["step"]["compute"] / 2)
    assert hours(2) is None, "full fine-tuning does not fit on 2 x 24 GiB"
    faster = hours(4, link_4090=20, host_4090=48)
    assert faster["step"]["link"] == pytest.approx(four["step"]["link"] / 2)
    assert faster["bound"] == "compute" and hours(4, link_4090=5)["bound"] == "traffic"


def test_twice_the_micro_batch_moves_half():
    config = memory_plan.load_config(ROOT / "tests" / "helpers" / "hub_config.json")
    zero3 = memory_plan.load_zero3(ROOT / "scripts" / "zero3.json")
    shapes = memory_plan.parameters(config)
    four, eight = (memory_plan.plan(config, zero3, 4, m, 16 // m, shapes=shapes) for m in (4, 8))
    speed = {"tflops": 165.2, "share": 0.5, "link": 10, "network": 10, "host": 24}
    a, b = (cost.step_seconds(p, 4, 1, 8e13, speed) for p in (four, eight))
    assert a["compute"] == b["compute"] and a["link"] == pytest.approx(2 * b["link"])
    assert cost.step_seconds(four, 4, 2, 8e13, speed | {"network": 5})["link"] == pytest.approx(2 * a["link"])


def test_ddp_gathers_no_weights_and_exchanges_gradients_once_a_step(args):
    file = args.model_name_or_path
    plans = {method: cost.best_plan(file, "whole", 576, method, 4, 64, 22.5) for method in cost.METHODS}
    for method in ("LoRA, DDP", "projector, DDP"):
        both_ways = 2 * 4 * plans[method]["trained"] * 3 / 4 / 1e9
        assert plans[method]["traffic_gb"] == {"between_gpus": pytest.approx(both_ways), "host": 0}
        assert plans[method]["items"]["parameters"] > 4 * plans["full"]["items"]["parameters"]
    gathers = plans["LoRA, ZeRO-3"]  # the frozen weights, for each micro-batch
    gathered = gathers["accumulation"] * 2 * gathers["parameters"] * 3 / 4 / 1e9
    assert gathers["traffic_gb"]["between_gpus"] > gathered > 40 * plans["LoRA, DDP"]["traffic_gb"]["between_gpus"]


def test_every_assumption_is_a_flag_with_its_source(run):
    done = run("python benchmarks/cost.py --help")
    assert done.code == 0
    for name, _, _ in cost.ASSUMPTIONS:
        assert f"--{name}" in done.output
    table = (ROOT / "benchmarks" / "results" / "cost.md").read_text()
    assert table.startswith("# Hours an epoch: computed, not measured")
    assert all(f"`--{name}` | {value:g} | {source}" in table for name, value, source in cost.ASSUMPTIONS)
    done = run("python benchmarks/cost.py --share_4090 0")
    assert done.code == 2 and "--share_4090" in done.output and "Traceback" not in done.output
