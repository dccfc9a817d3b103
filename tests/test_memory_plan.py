"""The memory plan against what really lives: a 2-rank ZeRO-3 engine, a fake-tensor trace, and its own promises."""

import gc
import json
import math
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import deep
import pytest

ROOT = Path(__file__).resolve().parent.parent
from animals.command import UserError  # noqa: E402
from animals.training import memory as memory_plan  # noqa: E402
from animals.training.parts import freeze  # noqa: E402
from scripts import memory_plan as command_module  # noqa: E402

HUB = ROOT / "tests" / "helpers" / "hub_config.json"  # config.json of llava-hf/llava-v1.6-mistral-7b-hf
ZERO3 = memory_plan.load_zero3(ROOT / "scripts" / "zero3.json")
GIB = 2**30
HELD = "parameters", "gradients", "master", "states"  # engine_probe.py's names of memory_plan.RESIDENT


@pytest.fixture(scope="module")
def hub():
    config = memory_plan.load_config(HUB)
    return config, memory_plan.parameters(config)


def live_engine(folder, demo, changes=None, ranks=2, more="", launch=None, **shape):
    """(what engine_probe.py counted, the model's config, the DeepSpeed settings it ran with): 4 steps of 2 x 2."""
    model = deep.build(folder / "model", demo.model, **shape)
    config = memory_plan.load_config(model)
    yaml, zero3 = deep.settings(folder, config, memory_plan.load_config(HUB), changes)
    for split in ("train_data", "validation_data"):
        for picture in demo.input.glob(f"{split}/*/00[0-3].*"):
            copy = folder / "input" / picture.relative_to(demo.input)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(picture, copy)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", launch or str(yaml)]
    command += ["--num_processes", str(ranks), "--main_process_port", "0"]
    command += ["tests/helpers/engine_probe.py", str(folder / "held.json")]
    command += ["--model_name_or_path", str(model), "--input_dir", str(folder / "input"), "--output_dir"]
    command += [str(folder / "sft"), "--temp_dir", str(folder / "temp"), "--logging_dir", str(folder / "logs")]
    flags = "--per_device_train_batch_size 2 --gradient_accumulation_steps 2 --max_steps 4 --logging_steps 1 "
    flags += "--optim adamw_bnb_8bit --activation_checkpointing --save_strategy no --eval_on_start"
    command += [*flags.split(), *more.split()]
    bf16 = {**os.environ, "CPU_BF16_SPEED": "1"}  # the plan's type, also where float32 is faster
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, cwd=ROOT, env=bf16)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((folder / "held.json").read_text()), config, zero3


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ({}, {}),
        (
            {"hidden": 104, "layers": 3, "vision_layers": 3},
            {"offload_param": {"device": "none"}, "stage3_max_reuse_distance": 0},
        ),
    ],
    ids=["32 layers, zero3.json", "odd sizes, no offload, no reuse"],
)
def test_the_plan_is_what_train_py_holds_and_moves(tmp_path, demo, shape, changes):
    """Partitions (2 %), gradients, master and states (exact), live weights, traffic, and what came too late."""
    held, config, zero3 = live_engine(tmp_path, demo, changes, **shape)
    planned = memory_plan.plan(config, zero3, num_gpus=2, micro_batch=2, accumulation=2, tokens=(50, 50))
    items = {name: value * GIB for name, value in planned["items"].items()}
    assert held["ranks"] == 2 and len(held["sub_groups"]) > 3  # a real partition, really divided
    assert planned["parameters"] == held["numel"]
    for name, real in (("gradients", "gradients"), ("fp32 master", "master"), ("8-bit states", "states")):
        assert items[name] == pytest.approx(held[real], rel=0.001), name  # same sub-groups, so exact but for rounding
    # "offloaded" partitions are held as well, by the same ranks here; the plan leaves them out of the GPU
    on_gpu = memory_plan.plan(config, zero3, num_gpus=2, tokens=(50, 50), offload_param=False)
    whole = on_gpu["items"]["parameters"] * GIB
    assert whole == pytest.approx(held["parameters"], rel=0.02)
    if not changes:
        assert items["parameters"] < 0.05 * whole
    assert max(held["sub_groups"]) * 6 == pytest.approx(items["optimizer step"], rel=0.02)
    steady = held["moved"][2:]  # the first two are recorded
    moved = max(step["all_gather"] + step["reduce_scatter"] for step in steady)
    most = planned["traffic_gb"]["between_gpus"] * 1e9 / 2  # 2 micro-steps x 2 bytes x half
    assert moved <= most <= (1.02 if not shape else 1.4) * moved
    live, with_head = (max(step[kind] for step in steady) for kind in ("live", "live_with_head"))
    head = math.prod(next(size for name, size, _ in memory_plan.parameters(config) if name == memory_plan.HEAD))
    assert with_head <= items["live layers"] / 2 + head
    if not shape:
        assert live == pytest.approx(items["live layers"] / 2, rel=0.05)
        assert sum(step["on_demand"] for step in steady) <= 0.02 * sum(step["all_gather"] for step in steady)
    else:
        assert live <= items["live layers"] / 2


PART = {"hidden": 104, "layers": 3, "vision_layers": 3}


@pytest.mark.parametrize(
    ("flags", "launch", "method"),
    [
        ("--train_parts projector", None, "full"),
        ("--train_parts vision,projector", None, "full"),
        ("--train_parts language", None, "full"),
        ("--use_peft", None, "lora"),
        ("--train_parts projector", "scripts/ddp.yaml", "ddp"),
        ("--train_parts vision,projector", "scripts/ddp.yaml", "ddp"),
        ("--use_peft", "scripts/ddp.yaml", "lora_ddp"),
    ],
)
def test_the_plan_is_what_parts_and_adapters_hold(tmp_path, demo, flags, launch, method):
    """Resident bytes within 2 %: what is frozen has its weights alone, no gradient, master weights or states."""
    held, config, zero3 = live_engine(tmp_path, demo, {"offload_param": {"device": "none"}}, 2, flags, launch, **PART)
    parts = flags.split()[1].split(",") if "parts" in flags else list(memory_plan.PARTS)
    planned = memory_plan.plan(config, zero3, num_gpus=2, tokens=(50, 50), parts=parts, method=method)
    numel = planned["parameters"] + planned["trained"] * ("lora" in method)
    assert held["ranks"] == 2 and 0 < planned["trained"] < planned["parameters"] and held["numel"] == numel
    assert held["master"] == pytest.approx(0 if launch else 4 * planned["trained"] / 2, rel=0.02)
    real = {name: held[key] for name, key in zip(memory_plan.RESIDENT, HELD, strict=True)}
    for name, size in real.items():
        assert planned["items"][name] * GIB == pytest.approx(size, rel=0.02), name
    assert planned["resident"] * GIB == pytest.approx(sum(real.values()), rel=0.02)


class Storages:
    """A dispatch mode that counts the bytes of live storages, and the most that there were."""

    def __new__(cls, known):
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode
        from torch.utils._pytree import tree_leaves

        class Mode(TorchDispatchMode):
            now = peak = 0

            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                out = function(*args, **(kwargs or {}))
                for tensor in tree_leaves(out):
                    if isinstance(tensor, torch.Tensor):
                        self.count(tensor.untyped_storage())
                return out

            def count(self, storage, size=None):
                key, size = storage._cdata, storage.nbytes() if size is None else size
                if key not in seen:
                    seen[key] = size
                    weakref.finalize(storage, self.drop, key)
                    self.now += size
                    self.peak = max(self.peak, self.now)

            def drop(self, key):
                self.now -= seen.pop(key)

        seen, mode = {}, Mode()
        for tensor in known:
            mode.count(tensor.untyped_storage(), 0)
        return mode


def traced(config, batch, tokens, tiles, parts=None):
    """(bytes saved by the forward, peak of forward and backward) of the real modules on fake tensors.

    parts: those that train off ZeRO-3, in float32 under autocast; None: all, in bfloat16. Vision tower with projector
    and language model are joined by hand: the model's own check of the placeholder count depends on data, which fake
    tensors have not. Gradients are dropped as they come, so that activations are counted.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import LlavaNextForConditionalGeneration

    with FakeTensorMode(allow_non_fake_inputs=True):
        model = LlavaNextForConditionalGeneration._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        model.activation_checkpointing_enable()
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


@pytest.mark.parametrize(("batch", "tokens", "tiles"), [(4, 1368, 3), (4, 2928, 5), (1, 2928, 5), (2, 1752, 3)])
def test_activations_equal_a_fake_tensor_trace(hub, batch, tokens, tiles):
    config, _ = hub
    assert memory_plan.tiles_of(config, tokens) == tiles
    planned = memory_plan.activations(config, batch, tokens)
    saved, peak = traced(memory_plan.load_config(HUB), batch, tokens, tiles)
    assert planned["saved"] == pytest.approx(saved, rel=0.1)
    assert planned["peak"] == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("parts", [["projector"], ["vision", "projector"], ["language"]], ids=",".join)
def test_activations_of_parts_off_zero3_equal_a_trace(hub, parts):
    """In float32 they make the residual stream between their layers float32."""
    config, shapes = hub
    planned = memory_plan.activations(config, 4, 1368, "ddp", parts=parts)
    saved, peak = traced(memory_plan.load_config(HUB), 4, 1368, 3, parts)
    # bf16 copies of a recomputed layer's weights, which the plan counts among the live layers
    layer = sum(math.prod(shape) for name, shape, _ in shapes if "language_model.layers.0." in name)
    peak -= 2 * layer * ("language" in parts)
    assert planned["saved"] == pytest.approx(saved, rel=0.1)
    assert planned["peak"] == pytest.approx(peak, rel=0.1)


def test_the_users_flags_fit_24_gib_up_to_the_largest_picture(hub):
    config, shapes = hub
    planned = memory_plan.plan(config, ZERO3, 4, 4, 4, (1368, 2928), shapes=shapes)
    assert planned["effective_batch"] == 64 and planned["parameters"] == 7_566_747_648
    assert planned["peaks"]["largest"] < 22.5
    assert planned["resident"] == pytest.approx(17.67 - 3.52 - 0.02, abs=0.01)  # CLIP's unread end does not train


def test_deepspeed_defaults_do_not_fit(hub):
    config, shapes = hub
    default = memory_plan.plan(config, {"zero_optimization": {"stage": 3}}, 4, 4, 4, shapes=shapes)
    assert default["items"]["optimizer step"] > 5.5  # sub_group_size 1e9
    assert default["peaks"]["median"] > 24 and default["peaks"]["largest"] > 24


def test_settings_change_no_mathematics():
    stage3 = ZERO3["zero_optimization"]
    assert "offload_optimizer" not in stage3  # accelerate would replace adamw_bnb_8bit by DeepSpeedCPUAdam
    assert stage3["sub_group_size"] < 2**31  # bitsandbytes passes the element count as int32
    assert "data_types" not in ZERO3 and ZERO3["bf16"] == {"enabled": "auto"}
    assert stage3["stage3_gather_16bit_weights_on_model_save"] is True  # else no weights are saved
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"):
        assert ZERO3[key] == "auto"


def test_recommendations(hub):
    config, _ = hub
    best = {}
    for gpus, method in ((4, "full"), (8, "full"), (1, "full"), (1, "lora"), (1, "qlora")):
        plans = memory_plan.rows(config, ZERO3, gpus, 64, (1368, 2928), method, 16)
        assert all(p["effective_batch"] == 64 for p in plans)
        best[gpus, method], reason = memory_plan.recommend(plans, 22.5)
        assert reason
    assert (
        best[1, "full"] is None
        and "--use_peft"
        in memory_plan.recommend(memory_plan.rows(config, ZERO3, 1, 64, (1368, 2928), "full", 16), 22.5)[1]
    )
    assert (best[4, "full"]["micro_batch"], best[4, "full"]["offload_param"]) == (4, True)
    for key in ((8, "full"), (1, "lora"), (1, "qlora")):
        assert best[key]["peaks"]["largest"] < 22.5


def test_image_tokens_equal_the_processor(hub):
    from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

    config, _ = hub

    class Processor:  # the two attributes that the method reads, as in the hub repository's processor_config.json
        patch_size, num_additional_image_tokens = 14, 1
        vision_feature_select_strategy = "default"
        image_processor = type("", (), {"image_grid_pinpoints": config.image_grid_pinpoints})
        _get_unpadded_features = LlavaNextProcessor._get_unpadded_features

    for height in range(50, 1500, 97):
        for width in range(50, 1500, 89):
            theirs = LlavaNextProcessor._get_number_of_features(Processor(), height, width, 336, 336)
            assert memory_plan.image_tokens(config, height, width) == theirs - 1, (height, width)  # "default": no CLS
    assert memory_plan.image_tokens(config, 225, 300) == memory_plan.TYPICAL_TOKENS
    assert memory_plan.image_tokens(config, 672, 672) == memory_plan.LARGEST_TOKENS


def test_tokens_come_from_the_cache(hub, tmp_path):
    config, _ = hub
    records = [{"width": 300, "height": 225}] * 3 + [{"width": 640, "height": 480}]
    (tmp_path / "train.json").write_text(json.dumps(records))
    counts = memory_plan.token_counts(config, tmp_path)
    assert (counts["median"], counts["largest"]) == (1368, 2340)
    (tmp_path / "train.json").write_text('[{"width": 300}]')
    with pytest.raises(UserError, match="expected records with width and height; delete the file"):
        memory_plan.token_counts(config, tmp_path)


def script(*flags):
    command = [sys.executable, "scripts/memory_plan.py", *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_json_and_table(monkeypatch, capsys, tmp_path):
    command = ["memory_plan.py", "--model_name_or_path", str(HUB), "--temp_dir", str(tmp_path)]
    command += ["--deepspeed_config", str(ROOT / "scripts" / "zero3.json")]
    monkeypatch.setattr(sys, "argv", [*command, "--json"])
    command_module.main()
    report = json.loads(capsys.readouterr().out)
    assert report["tokens"]["source"].startswith("assumed") and len(report["plans"]) == 15
    assert report["recommended"]["micro_batch"] == 4
    kinds = [(p["offload_param"], p["offload_activations"]) for p in report["plans"]]
    assert kinds == [(False, False)] * 5 + [(True, False)] * 5 + [(False, True)] * 5
    assert [p["micro_batch"] for p in report["plans"][:5]] == [1, 2, 4, 8, 16]
    monkeypatch.setattr(sys, "argv", command)
    command_module.main()
    table = capsys.readouterr().out
    assert "recommended: 4 per device x 4 accumulated x 4 ranks = 64 pictures a step" in table
    for item in report["plans"][0]["items"]:
        assert item in table


def test_host_ram_of_each_phase(hub, monkeypatch):
    config, shapes = hub
    host = memory_plan.plan(config, ZERO3, 4, 4, 4, shapes=shapes)["host_gib"]
    weights, states, processes = 2 * 7.5667e9 / GIB, (6.04 + 2.03) * 7.5667e9 / GIB, 12
    assert host["start"] == pytest.approx(2 * weights + processes, rel=0.01)  # rank 0's copy beside all partitions
    on_disk, pinned = 2 * 7_566_747_648, 2 * (7_566_747_648 - SMALL)  # norms and biases stay on the GPUs
    assert host["start"] == pytest.approx((on_disk + pinned) / GIB + processes, rel=1e-6)
    assert host["training"] == pytest.approx(2 * weights + processes, rel=0.01)  # the copy that is saved
    assert host["resume"] == pytest.approx(weights + states / 4 + processes, rel=0.01)
    at_once = {"zero_optimization": {**ZERO3["zero_optimization"], "pipeline_loading_checkpoint": False}}
    planned = memory_plan.plan(config, at_once, 4, 4, 4, shapes=shapes)
    assert planned["host_gib"]["resume"] == pytest.approx(weights + states + processes, rel=0.01)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=64 * GIB))
    with pytest.raises(UserError, match="found 64 GiB of RAM; expected 83 GiB for resume"):
        memory_plan.check_host(planned, 4)
    memory_plan.check_host(planned, 2)  # half of the ranks are on another machine


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_name_or_path", "nowhere"], "nowhere: found"),
        (["--model_name_or_path", "scripts/zero3.json"], "expected llava_next"),
        (["--deepspeed_config", "nowhere.json", "--model_name_or_path", str(HUB)], "give --deepspeed_config"),
        (["--num_gpus", "3", "--model_name_or_path", str(HUB)], "expected a multiple of the GPUs; give one, like 48"),
        (["--load_in_4bit"], "expected --use_peft too"),
    ],
)
def test_mistakes_get_one_line(flags, message):
    done = script(*flags)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1


def test_help_imports_no_torch():
    check = "import sys; sys.path.insert(0, 'scripts'); import memory_plan; "
    check += "assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=ROOT)


HEAD, WEIGHT, SMALL = 32064 * 4096, 14336 * 4096, 603_136  # elements: the head; the largest other weight; norms, biases


def in_bytes(hub, *numbers, **more):
    config, shapes = hub
    planned = memory_plan.plan(config, more.pop("zero3", ZERO3), *(numbers or (4, 4, 4)), shapes=shapes, **more)
    return planned, {name: size * GIB for name, size in planned["items"].items()}


@pytest.mark.parametrize("method", ["full", "on the GPU", "lora", "lora_ddp", "qlora", "projector", "vision"])
def test_every_item_by_hand(hub, method):
    """The hub's model: 7,566,747,648 parameters, of which 7,554,149,376 are read; a quarter of them on each rank."""
    total, decoder = 7_566_747_648, 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * WEIGHT)
    adapters = 16 * 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    full = {"gradients": 7_554_149_376 / 2, "fp32 master": 7_554_149_376, "8-bit states": 7_554_149_376 / 4 * 2.03125}
    full |= {"live layers": 2 * (410e6 / 2 + WEIGHT), "buckets": 2 * 42e6 + 2 * WEIGHT}
    full |= {"optimizer step": 6 * 110_727_680, "LM-head backward": 8 * HEAD}  # the fullest group of 100 M and the next
    of_vision = [size for name, shape, _ in hub[1] if (size := math.prod(shape)) and "vision_tower" in name]
    del of_vision[-18:]  # the last layer and the norm after it: not read
    by_ddp = {"vision": of_vision, "projector": [4096, 1024 * 4096, 4096, 4096 * 4096, 4096]}.get(method, [])
    ddp, states = sum(by_ddp), sum(2 * n + 8 * n / 256 if n >= 4096 else 8 * n for n in by_ddp)
    none = dict.fromkeys(("fp32 master", "buckets", "optimizer step", "LM-head backward"), 0)
    options, expected = {
        "full": ({}, full | {"parameters": 2.5 * SMALL}),
        "on the GPU": ({"offload_param": False}, full | {"parameters": total / 2 + 2 * SMALL}),
        "lora": (
            {"method": "lora"},
            {"parameters": 2.5 * SMALL + adapters / 2, "gradients": adapters / 2, "fp32 master": adapters}
            | {"8-bit states": adapters / 4 * 2.03125, "live layers": full["live layers"], "buckets": 2 * 42e6}
            | {"optimizer step": 6 * adapters / 4, "LM-head backward": 2 * HEAD},
        ),
        "lora_ddp": (  # float32 adapters, their gradients twice (DDP's buckets), the bf16 copies that autocast keeps
            {"method": "lora_ddp"},
            {"parameters": 2 * total + 4 * adapters, "gradients": 4 * adapters, "live layers": 2 * adapters}
            | none | {"8-bit states": adapters * 2.03125, "buckets": 4 * adapters},
        ),
        "qlora": (  # half a byte and 1/64 of an absmax for each weight of the decoder layers
            {"method": "qlora"},
            {"parameters": 2 * (total - decoder) + decoder * (1 / 2 + 4 / 64) + 2 * adapters, "gradients": 2 * adapters}
            | none | {"8-bit states": adapters * 2.03125, "live layers": 2 * WEIGHT},
        ),
    }.get(method) or (  # fmt: skip
        {"method": "ddp", "parts": [method]},
        {"parameters": 2 * total + 2 * ddp, "gradients": 4 * ddp, "8-bit states": states, "live layers": 2 * ddp}
        | none | {"buckets": 4 * ddp},
    )  # fmt: skip
    planned, items = in_bytes(hub, **options)
    assert {name: items[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert items["reserve (assumed)"] == 0.8 * GIB
    for which in ("median", "largest"):
        held = sum(items[name] for name in (*memory_plan.RESIDENT, "buckets", "reserve (assumed)"))
        peak = held + items["live layers"] + items[f"activations, {which}"]
        assert planned["peaks"][which] == pytest.approx(peak / GIB) and planned["peak_phase"][which] == "backward"
    saved = (ddp or adapters if "lora" in method else total) * 2.01e-9
    if method in ("full", "lora"):
        trained = 7_554_149_376 if method == "full" else adapters
        checkpoint = 6.04e-9 * trained + saved
        expected = {"checkpoint": checkpoint, "kept": 7, "final": saved, "total": 7 * checkpoint + saved}
        assert planned["disk_gb"] == pytest.approx(expected)  # 5 kept, 1 written, the best


def test_activations_by_hand(hub):
    """Four pictures of 1,368 tokens beside 60 of text: 5,712 positions, 12 tiles of 577 patches."""
    kept = 2 * 5712 * 4096 * 32 + 2 * 6924 * 1024 * 24
    saved = kept + 2 * 3 * 12 * 336**2 + 4 * 6924 * 1024 + 4 * 6924 * 4096 + 2 * 6924 * 1024 + 8 * 5712 * 4096
    peak = saved + 5712 * (14 * 4096 + 4 * 1024 + 12 * 14336)
    assert memory_plan.activations(hub[0], 4, 1368) == {"kept": kept, "saved": saved, "peak": peak}
    lora = memory_plan.activations(hub[0], 4, 1368, "lora")
    assert lora["peak"] - peak == 9 * 5712 * (6 * 4096 + 14336) - 2 * 6924 * 1024 * 24  # no tower
    frozen = memory_plan.activations(hub[0], 4, 1368, parts=("projector", "language"))
    assert saved - frozen["saved"] == 4 * 6924 * 1024
    assert [memory_plan.tiles_of(hub[0], tokens) for tokens in (1776, 1777)] == [3, 5]  # 3 x 576 and 2 x 24 line ends
    planned, items = in_bytes(hub, offload_activations=True)
    assert items["activations, median"] == pytest.approx(peak - kept)
    _, items = in_bytes(hub, formed=(2, 2928), text_tokens=30)
    assert items["activations, largest"] == pytest.approx(memory_plan.activations(hub[0], 2, 2928, "full", 30)["peak"])


def test_the_highest_moment_is_found(hub):
    """Few tokens: where the head's gradient stands; large groups of the optimizer: in its step."""
    planned, items = in_bytes(hub, 4, 1, 1, (50, 50), offload_activations=True)
    resident = sum(items[name] for name in (*memory_plan.RESIDENT, "buckets", "reserve (assumed)"))
    found = memory_plan.activations(hub[0], 1, 50)
    peak = resident + items["live layers"] + items["LM-head backward"] + found["saved"] - found["kept"]
    assert planned["peak_phase"]["median"] == "LM head" and planned["peaks"]["median"] == pytest.approx(peak / GIB)
    planned, items = in_bytes(hub, 4, 1, 1, (50, 50), zero3={"zero_optimization": {"stage": 3}})
    assert planned["peak_phase"]["median"] == "optimizer step"


def test_traffic_by_hand(hub):
    """GB a GPU and step: 4 x 2 bytes x 3/4 of what is gathered and reduced in each of 4 micro-steps."""
    layers, trained = 7_566_747_648 - 2 * HEAD, 7_554_149_376
    for reuse, passes in ((402_653_184, 2), (402_653_183, 3)):  # twice a decoder layer without its first weight
        zero3 = {"zero_optimization": {**ZERO3["zero_optimization"], "stage3_max_reuse_distance": reuse}}
        gathered = passes * layers + 3 * HEAD
        traffic = in_bytes(hub, zero3=zero3)[0]["traffic_gb"]
        expected = {"between_gpus": 6e-9 * (gathered + trained), "host": 2e-9 * gathered + trained / 2e9}
        assert traffic == pytest.approx(expected)
    kept = memory_plan.activations(hub[0], 4, 1368)["kept"]
    for method, each, bytes_each in (("qlora", 41_943_040, 2), ("ddp", trained, 4)):
        traffic = in_bytes(hub, method=method, offload_activations=True)[0]["traffic_gb"]
        assert traffic == pytest.approx({"between_gpus": 1.5e-9 * each * bytes_each, "host": 4 * 2e-9 * kept})
    assert in_bytes(hub, 1, 4, 4)[0]["traffic_gb"]["between_gpus"] == 0


def test_host_ram_without_zero3(hub):
    """A rank reads tensor after tensor, the embedding at most; activation offload takes pinned memory."""
    planned, _ = in_bytes(hub, method="qlora", offload_activations=True)
    kept, states = memory_plan.activations(hub[0], 4, 2928)["kept"], (6.04 + 2.03) * 41_943_040
    expected = {"start": 4 * 2 * HEAD, "training": 4 * kept, "resume": states, "validation": 4 * 2 * HEAD}
    assert planned["host_gib"] == pytest.approx({phase: n / GIB + 12 for phase, n in expected.items()})


def test_settings_that_deepspeed_and_transformers_fill_in(hub):
    names = "stage3_param_persistence_threshold", "reduce_bucket_size", "stage3_max_live_parameters"
    names += ("stage3_max_reuse_distance",)
    for value, expected in ((None, [1e5, 5e8, 1e9, 1e9]), ("auto", [40960, 4096**2, 1e9, 1e9])):
        zero3 = {"zero_optimization": dict.fromkeys(names, value) if value else {}}
        run = memory_plan.Run(hub[0], zero3, 4, 4, 4, (1, 1), False, False, "full", 16, hub[1], None, 60, ["projector"])
        assert [run.threshold, run.bucket, run.max_live, run.reuse] == expected
        assert run.gradient == 2 and [run.part(n) for n in (8, 9)] == [2, 3]


def test_nothing_is_known_of_the_pictures_yet(hub, tmp_path):
    counts = memory_plan.token_counts(hub[0], tmp_path)
    assert (counts["median"], counts["largest"]) == (1368, 2928)
