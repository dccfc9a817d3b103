"""scripts/memory_plan.py against what really lives: engines of train.py on two CPU ranks, and a fake-tensor trace.

The engines and most traces are slow: `sh tests/run.sh -m slow` runs them.
"""

import gc
import json
import math
import os
import re
import subprocess
import sys
import weakref

import deep
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from animals.training.parts import ALL, PARTS, freeze, read_parts
from animals.training.recipes import OFFLOAD, recipes
from scripts import memory_plan
from scripts.memory_plan import GIB, HEAD, RESIDENT
from tests.conftest import ROOT
from tests.test_readme import BOTH

HUB = "tests/helpers/hub_config.json"  # config.json of llava-hf/llava-v1.6-mistral-7b-hf
DDP = "scripts/ddp.yaml"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "method", "flags"),
    [
        (32, "full", ""),
        (3, "full", "--train_parts projector"),
        (3, "full", "--train_parts vision,projector"),
        (3, "full", "--train_parts language"),
        (3, "full", "--train_parts attention"),
        (3, "lora", "--use_peft"),
        (3, "ddp", "--train_parts projector"),
        (3, "ddp", "--train_parts vision,projector"),
        (3, "lora_ddp", "--use_peft"),
        (3, "lora", "--train_parts vision,projector --use_peft"),
        (3, "lora_ddp", "--train_parts vision,projector --use_peft"),
    ],
)
def test_the_plan_is_what_train_py_holds(tmp_path, demo, layers, method, flags):
    """What is resident, within 2 %, after 4 steps of 2 x 2 on 2 ranks; a frozen part has its weights alone."""
    shape = {} if layers == 32 else {"hidden": 104, "layers": layers, "vision_layers": layers}
    model = deep.build(tmp_path / "model", demo.model, **shape)
    config = memory_plan.load_config(model)
    yaml, zero3 = deep.settings(tmp_path, config, memory_plan.load_config(HUB))
    command = (
        f"{sys.executable} -m accelerate.commands.launch --config_file {DDP if 'ddp' in method else yaml} "
        f"--num_processes 2 --main_process_port 0 tests/helpers/engine_probe.py {tmp_path}/held.json "
        f"--model_name_or_path {model} --input_dir temp/demo/input --temp_dir temp/demo/cache --save_strategy no "
        f"--output_dir {tmp_path}/sft --logging_dir {tmp_path}/logs --per_device_train_batch_size 2 --max_steps 4 "
        "--gradient_accumulation_steps 2 --optim adamw_bnb_8bit --activation_checkpointing --eval_on_start "
        f"--eval_pictures 20 {flags}"
    )
    bf16 = {**os.environ, "BF16_ON_CPU": "1"}  # the type that is planned
    done = subprocess.run(command.split(), capture_output=True, text=True, timeout=1800, env=bf16)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    held, shapes = json.loads((tmp_path / "held.json").read_text()), memory_plan.parameters(config)
    parts = flags.split()[1].split(",") if "parts" in flags else [] if "lora" in method else PARTS
    planned = memory_plan.plan(config, shapes, zero3, method, num_gpus=2, micro_batch=2, parts=parts)
    assert held["ranks"] == 2 and planned["trained"] > 0
    adapters = sum(memory_plan.trained_weights(config, shapes, method, []).values()) if "lora" in method else 0
    assert held["numel"] == planned["parameters"] + adapters
    items = {name: gib * GIB for name, gib in planned["items_gib"].items()}
    assert {name: items[name] for name in RESIDENT} == pytest.approx({name: held[name] for name in RESIDENT}, rel=0.02)
    if layers == 32:
        holds_what_zero3_json_promises(held, items, math.prod(shapes[HEAD]))


def holds_what_zero3_json_promises(held, items, head):
    """What is gathered and alive; the head is released before the layers' backward; few gathers are waited for."""
    largest = max(held["sub_groups"]) * 6
    assert len(held["sub_groups"]) > 3 and largest <= items["optimizer step"] < 1.5 * largest
    steady = held["moved"][2:]  # DeepSpeed records the order of the weights in the first two
    most = {kind: max(step[kind] for step in steady) for kind in steady[0]}
    assert most["live"] == pytest.approx(items["live layers"] / 2, rel=0.05)
    assert most["live_with_head"] <= items["live layers"] / 2 + head
    assert all(step["all_gather"] < 2.1 * step["reduce_scatter"] for step in steady)  # not 3: one layer is kept
    assert sum(step["on_demand"] for step in steady) <= 0.02 * sum(step["all_gather"] for step in steady)


class Storages(TorchDispatchMode):
    """Counts the bytes of the storages that live (.now), and the most that there were (.peak); not the `known` ones."""

    def __init__(self, known):
        super().__init__()
        self.now = self.peak = 0
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.drop, storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
        return out

    def drop(self, key):
        self.now -= self.sizes.pop(key)


class Moved(torch.autograd.graph.saved_tensors_hooks):
    """In place of save_on_cpu, for tensors without content: saves a shape, of nothing on the GPU, and counts bytes."""

    total = 0

    def __init__(self, **_):
        super().__init__(self.pack, lambda kept: torch.empty(kept[0], dtype=kept[1]))

    def pack(self, tensor):
        Moved.total += tensor.nbytes
        return tensor.shape, tensor.dtype


def traced(config, batch, tokens, tiles, parts, offload):
    """(bytes saved by the forward, peak of forward and backward) of the real modules on fake tensors.

    parts: those that train without ZeRO-3, in float32 under autocast; None: all, in bfloat16. Vision tower with
    projector and language model are joined by hand: the model's own check of the placeholder count depends on data,
    which fake tensors have not. Gradients are dropped as they come, so that activations are counted.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = memory_plan.model_class(config)._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        model.activation_checkpointing_enable(offload=offload)
        model.train()
        if parts:
            freeze(model, parts, float32=True)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=bool(parts), cache_enabled=False)
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        length, size = tokens + memory_plan.TEXT_TOKENS, config.vision_config.image_size
        with Storages([*model.parameters(), *model.buffers()]) as storages, autocast:
            pixels = torch.zeros(batch * tiles, 3, size, size, dtype=torch.bfloat16)
            text = model.model.get_input_embeddings()(torch.zeros(batch, length, dtype=torch.long))
            hidden = model.model.vision_tower(pixels, return_dict=True, output_hidden_states=True).hidden_states
            picture = model.model.multi_modal_projector(hidden[config.vision_feature_layer][:, 1:])
            del hidden
            picture = picture.flatten(0, 1)[: batch * tokens].reshape(batch, -1, text.shape[-1])
            rows = torch.cat([picture, text[:, picture.shape[1] :]], 1)  # (batch, length, hidden)
            del picture, text
            out = model.model.language_model(inputs_embeds=rows, use_cache=False).last_hidden_state  # as in training
            del rows
            gc.collect()  # the frozen tower's hidden states
            saved = storages.now
            loss = out[:, -2:].float().sum()  # the head sees the answer's tokens only
            del out
            loss.backward()
    return saved, storages.peak


TRACES = (1, "largest", None, False), (1, "largest", None, True), (4, "largest", None, False)
TRACES += (4, "300x225", None, False), (4, "whole view", None, False), (8, "300x225", None, True)
TRACES += tuple((4, "300x225", parts, False) for parts in ("projector", "vision,projector", "language", "attention"))


@pytest.mark.parametrize(
    ("batch", "view", "parts", "offload"),
    [*TRACES[:2], *(pytest.param(*trace, marks=pytest.mark.slow) for trace in TRACES[2:])],
)
def test_activations_equal_a_trace_of_the_real_model(batch, view, parts, offload, monkeypatch):
    """offload: of the layers' inputs to host RAM, what `--rehearse all` tries."""
    monkeypatch.setattr("transformers.modeling_utils.save_on_cpu", Moved)
    monkeypatch.setattr(Moved, "total", 0)
    config, parts = memory_plan.load_config(HUB), parts and parts.split(",")
    tokens, tiles = memory_plan.views(config)[view]
    planned = memory_plan.activations(config, batch, tokens, tiles, "ddp" if parts else "full", parts or PARTS, offload)
    saved, peak = traced(config, batch, tokens, tiles, parts, offload)
    if parts == ["language"]:  # bf16 copies of a recomputed layer's weights, which the plan counts as live layers
        peak -= 2 * deep.decoder_layer(config)
    assert planned["saved"] == pytest.approx(saved, rel=0.1)
    assert planned["peak"] == pytest.approx(peak, rel=0.1)
    assert planned["host"] == pytest.approx(Moved.total, rel=0.1) and bool(Moved.total) == offload


def command(flags):
    words = [sys.executable, "scripts/memory_plan.py", *flags.split()]
    return subprocess.run(words, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("flags", ["", "--num_gpus 4 --method full --micro_batch 4"])
def test_the_readme_shows_what_the_command_prints(flags):
    printed = command(f"--model_name_or_path {HUB} {flags}").stdout
    assert printed.split("\n\n", 1)[1].strip() in (ROOT / "scripts" / "README.md").read_text(), printed


def test_flags_name_one_command():
    flags = "--method ddp --train_parts vision,projector --num_gpus 2 --micro_batch 1 --json"
    found = json.loads(command(f"--model_name_or_path {HUB} {flags}").stdout)
    assert found["views"] == {"300x225": [1368, 3], "largest": [2928, 5], "whole view": [576, 1]}
    (plan,) = found["plans"]
    assert plan["parameters"] == 7_566_747_648 and plan["resident_gib"] < min(plan["peak_gib"].values())
    assert plan["command"] == f"sh train.sh --learning_rate 1e-3 --config_file {DDP} --train_parts vision,projector"


def test_every_training_command_of_the_documents_fits_its_cards():
    """Four cards of 24 GB, which report 23.6 GiB; without ZeRO-3 each card holds all, so one is planned for."""
    texts = [(ROOT / name).read_text() for name in (*BOTH, "scripts/README.md", "train.sh")]
    texts = [line for text in texts for line in text.splitlines() if line.split(" ")[0] not in memory_plan.METHODS]
    found = re.findall(r"sh train\.sh( --[^`\n]+)", "\n".join(texts))
    shown = {re.split(r"  |#", flags)[0] for flags in found}
    config = memory_plan.load_config(HUB)
    shapes, zero3 = memory_plan.parameters(config), json.loads((ROOT / "scripts" / "zero3.json").read_text())
    planned = {}
    for flags in sorted(shown):
        lora = ("qlora" if "--load_in_4bit" in flags else "lora_ddp") if DDP in flags else "lora"
        method = lora if "--use_peft" in flags else "ddp" if DDP in flags else "full"
        micro = int((re.findall(r"--per_device_train_batch_size (\d+)", flags) or [4])[0])
        parts = read_parts((re.findall(r"--train_parts (\S+)", flags) or ["none" if "lora" in method else ALL])[0])
        gpus = 1 if DDP in flags else 4
        planned[flags] = max(memory_plan.plan(config, shapes, zero3, method, gpus, micro, parts)["peak_gib"].values())
    assert len(planned) >= 6 and not {flags: gib for flags, gib in planned.items() if gib > 23.6}


def test_every_recipe_of_rehearse_all_is_planned(monkeypatch, capsys):
    """What waits in host RAM is not on the GPU: the more waits there, the lower the peak of four GPUs."""
    config, peaks, host = memory_plan.load_config(HUB), {}, {}
    shapes = memory_plan.parameters(config)
    for recipe in recipes(4, 4, "scripts/deepspeed_zero3.yaml", gpus=4):
        micro, gpu, away = int(recipe["name"].split()[0]), "zero3_gpu" in recipe["flags"], OFFLOAD in recipe["flags"]
        zero3 = json.loads((ROOT / "scripts" / f"zero3{'_gpu' * gpu}.json").read_text())
        found = memory_plan.plan(config, shapes, zero3, "full", 4, micro, PARTS, away)
        assert ("zero3_gpu" in found["command"], OFFLOAD in found["command"]) == (gpu, away)
        peaks[micro, gpu, away], host[micro, gpu, away] = max(found["peak_gib"].values()), found["host_gib"]
    assert len(peaks) == 12
    for micro in (4, 8, 16):
        for fuller, other in (((True, False), (False, False)), ((True, True), (False, True))):  # parameters move
            assert peaks[micro, *fuller] - peaks[micro, *other] == pytest.approx(7_566_747_648 * 2 / 4 / GIB, rel=0.01)
        for gpu in (True, False):  # activations move
            assert peaks[micro, gpu, False] > peaks[micro, gpu, True]
            assert host[micro, gpu, False] <= host[micro, gpu, True]
            assert micro == 16 or peaks[micro, gpu, True] < peaks[2 * micro, gpu, True]
    assert peaks[8, False, True] < 23.6 < peaks[8, False, False], "on cards of 24 GB"
    flags = f"--model_name_or_path {HUB} --method full --num_gpus 4 --micro_batch 8 --json --offload"
    for word, key in (("none", (8, True, False)), ("both", (8, False, True))):
        monkeypatch.setattr(sys, "argv", ["memory_plan.py", *flags.split(), word])
        memory_plan.main()
        assert max(json.loads(capsys.readouterr().out)["plans"][0]["peak_gib"].values()) == peaks[key]


def test_help_imports_no_torch():
    check = "import sys; import scripts.memory_plan; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model_name_or_path nowhere", "found no such file; expected the model's config.json"),
        ("--model_name_or_path scripts/zero3.json", "expected 'llava_next'"),
        ("--method lora --train_parts attention", "found attention with --method lora; expected vision, "),
        ("--num_gpus -1", "--num_gpus: found -1; expected a number from 1 to 4096"),
    ],
)
def test_mistakes_get_one_line(flags, message):
    done = command(flags)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
