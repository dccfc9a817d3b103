"""How much memory, host RAM, disk and traffic a training run takes, computed from config.json before any weight loads.

Computed, not measured: no GPU was at hand. tests/test_memory_plan.py holds the resident bytes against a live 2-rank
ZeRO-3 engine on CPU and the activations against a fake-tensor trace of the real model. Each formula names the library
function that it models (torch 2.13, transformers 5.23, trl 1.16, deepspeed 0.19.8, bitsandbytes 0.50.2, peft 0.21).
GiB are 2**30 bytes, GB are 10**9.

A plan is what plan() returns:
  method "full" | "lora" | "qlora" · num_gpus · micro_batch · accumulation · effective_batch · offload_param ·
  offload_activations · items {name: GiB on each GPU} · resident · peaks {"median", "largest": GiB} · peak_phase ·
  host_gib · disk_gb {"checkpoint", "kept", "final", "total"} · traffic_gb {"between_gpus", "host", per GPU and step}
"""

import json
import math
import re
from pathlib import Path

from animals.checkpoint.tokens import Geometry, image_token_count
from animals.command import UserError
from animals.training.batches import TEXT_TOKENS, largest_micro_batch  # noqa: E402

GIB = 2**30
RESERVE = 0.8  # GiB, an assumption, not computed: CUDA context, cuBLAS workspace, NCCL buffers (reports say 0.7 to 1)
MARGIN = 1.5  # GiB that a plan leaves free for fragmentation: 24 -> 22.5
RANK_RAM = 3.0  # GiB of host RAM a rank for Python, libraries, CUDA and its data workers; an assumption
CHECKPOINT_BYTES = 6.08  # a trained parameter in global_step*/: fp32 master 4, 8-bit m and v 2.03, rest
WEIGHT_BYTES = 2.01  # a parameter in bf16 safetensors
TYPICAL_TOKENS, LARGEST_TOKENS = 1368, 2928  # image_tokens() of a 300x225 picture, and the most that there can be
HEAD = "lm_head.weight"
NO_DECAY = r"bias|layernorm|layrnorm|layer_norm|(?:^|\.)norm\."  # as Trainer.get_decay_parameter_names


def load_config(folder: str):
    """The LlavaNextConfig of a model folder or a config.json file."""
    file = Path(folder) / "config.json" if Path(folder).is_dir() else Path(folder)
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: found {error}; expected the model's config.json; give --model_name_or_path") from None
    if values.get("model_type") != "llava_next":
        found = values.get("model_type")
        raise UserError(f"{file}: found model_type {found!r}; expected llava_next; give another --model_name_or_path")
    from transformers import LlavaNextConfig

    return LlavaNextConfig(**values)


def load_zero3(file: str) -> dict:
    try:
        zero3 = json.loads(Path(file).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: found {error}; expected DeepSpeed's JSON; give --deepspeed_config") from None
    if zero3.get("zero_optimization", {}).get("stage") != 3:
        raise UserError(f"{file}: found no zero_optimization.stage 3; expected ZeRO-3, all that is modelled; set it")
    return zero3


def parameters(config) -> list[tuple[str, tuple, bool]]:
    """(name, shape, is the weight of a Linear) of every parameter, in the model's order; built on the meta device."""
    import torch
    from transformers import LlavaNextForConditionalGeneration

    with torch.device("meta"):
        model = LlavaNextForConditionalGeneration(config)
    linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    return [(n, tuple(p.shape), n in linear) for n, p in model.named_parameters()]


def image_tokens(config, height: int, width: int) -> int:
    """Tokens of one picture under a LlavaNextConfig, as its processor counts them."""
    vision = config.vision_config
    return image_token_count(width, height, Geometry(vision.image_size, vision.patch_size, config.image_grid_pinpoints))


def token_counts(config, temp_dir: str) -> dict:
    """Image tokens of the median and the largest picture in <temp_dir>/train.json, else the documented assumption."""
    file = Path(temp_dir) / "train.json"
    if not file.exists():
        source = f"assumed: {file} is not there yet (300x225 pictures, and the largest that there can be)"
        return {"median": TYPICAL_TOKENS, "largest": LARGEST_TOKENS, "source": source}
    counts = sorted(all_counts(config, temp_dir))
    source = f"{len(counts):,} pictures of {file}"
    return {"median": counts[len(counts) // 2], "largest": counts[-1], "source": source}


def all_counts(config, temp_dir: str) -> list[int]:
    """Image tokens of every picture in <temp_dir>/train.json, in its order."""
    file = Path(temp_dir) / "train.json"
    try:
        records = json.loads(file.read_text())
        counts = [image_tokens(config, record["height"], record["width"]) for record in records]
        counts[0]  # IndexError: no pictures
        return counts
    except (OSError, ValueError, KeyError, TypeError, IndexError, ZeroDivisionError) as error:
        raise UserError(
            f"{file}: found {error!r}; expected records with width and height; delete the file, training rebuilds it"
        ) from None


def tiles_of(config, tokens: int) -> int:
    """The most vision tiles that a picture of so many tokens can have, base tile included: 3 or 5 at the hub's grid."""
    size = config.vision_config.image_size
    side = size // config.vision_config.patch_size
    grids = sorted(h // size * (w // size) for h, w in config.image_grid_pinpoints)
    return 1 + grids[0 if tokens <= (grids[0] + 1) * side * side + grids[0] * side else -1]


def activations(config, micro_batch: int, tokens: int, method: str = "full") -> dict:
    """Bytes with activation checkpointing and SDPA; `tokens` are the picture's. A trace agrees within 10 % (tests).

    kept: inputs of the checkpointed layers (torch.utils.checkpoint); what activation offload moves to the host.
    saved: all that lives when the forward ends, kept included. peak: in the backward of the last decoder layer.
    """
    text, vision = config.text_config, config.vision_config
    hidden, wide = text.hidden_size, text.intermediate_size
    length = tokens + TEXT_TOKENS
    n = micro_batch * length  # decoder positions
    tiles = micro_batch * tiles_of(config, tokens)
    patches = tiles * ((vision.image_size // vision.patch_size) ** 2 + 1)  # with CLS
    kept = 2 * n * hidden * text.num_hidden_layers + 2 * patches * vision.hidden_size * vision.num_hidden_layers
    saved = kept + 2 * 3 * tiles * vision.image_size**2 + 2 * 2 * patches * vision.hidden_size  # CLIPVisionEmbeddings
    saved += 2 * 2 * patches * hidden + 2 * patches * vision.hidden_size  # LlavaNextMultiModalProjector: GELU, input
    saved += (2 + 4 + 2) * n * hidden + micro_batch * length**2  # last hidden, MistralRMSNorm fp32 and bf16; bool mask
    # MistralDecoderLayer, recomputed: two norms of fp32 4 + bf16 2 + 2; q, k, v, repeated by sdpa_attention_forward
    # where there is a mask, 6; attention out 2; gradient 2: 26 B x hidden, less the final norm's 8, freed by then.
    # MistralMLP: gate, silu, up, and the gradients of silu, up and their product: 6 x 2 B x intermediate.
    peak = saved + n * (18 * hidden + 12 * wide) + micro_batch * length**2
    if method != "full":  # peft Linear.forward, at most: fp32 copy 4, dropout 4, its mask 1 of each input
        peak += 9 * n * (6 * hidden + wide)
    return {"kept": kept, "saved": saved, "peak": peak}


def plan(
    config, zero3: dict, num_gpus: int = 4, micro_batch: int = 4, accumulation: int = 4,
    tokens: tuple[int, int] = (TYPICAL_TOKENS, LARGEST_TOKENS), *, offload_param: bool | None = None,
    offload_activations: bool = False, method: str = "full", lora_r: int = 16, save_total_limit: int = 5,
    shapes: list | None = None, formed: tuple[int, int] | None = None,
) -> dict:  # fmt: skip
    """The plan of one run as a dict (keys: module docstring).

    config: LlavaNextConfig. zero3: the parsed DeepSpeed file, "auto" as transformers fills it. tokens: image tokens of
    the (median, largest) picture. offload_param: None = as zero3 says. method: "full", "lora" (bf16 base, partitioned)
    or "qlora" (NF4 base, whole on each GPU: DDP). shapes: parameters(config), to build the model once for many plans.
    formed: (pictures, tokens of the longest) of the largest micro-batch that batch_rebalance forms (batches.py); None
    for other samplers, which may put micro_batch of the largest pictures together.
    """
    stage3 = zero3["zero_optimization"]
    if offload_param is None:
        offload_param = (stage3.get("offload_param") or {}).get("device", "none") != "none"
    offload_param &= method != "qlora"
    hidden = config.text_config.hidden_size

    def setting(name, default, auto):  # DeepSpeedZeroConfig; "auto": HfTrainerDeepSpeedConfig.trainer_config_finalize
        value = stage3.get(name, default)
        return int(auto if value == "auto" else value)

    def part(size):  # Init._aligned_size: padded to a multiple of the ranks
        return math.ceil(size / ranks)

    threshold = setting("stage3_param_persistence_threshold", 1e5, 10 * hidden)
    bucket = setting("reduce_bucket_size", 5e8, hidden * hidden)
    max_live = setting("stage3_max_live_parameters", 1e9, 1e9)
    reuse = setting("stage3_max_reuse_distance", 1e9, 1e9)
    group_limit = setting("sub_group_size", 1e9, 1e9)
    grad_bytes = 4 if zero3.get("data_types", {}).get("grad_accum_dtype") == "fp32" else 2

    shapes = shapes or parameters(config)
    ranks = 1 if method == "qlora" else num_gpus
    sizes = [(name, math.prod(shape)) for name, shape, _ in shapes]
    total = sum(size for _, size in sizes)
    trained = sizes
    if method != "full":  # peft LoraLayer: A (r x in) and B (out x r) beside every Linear but the head
        trained = [(name, lora_r * sum(shape)) for name, shape, linear in shapes if linear and name != HEAD]

    # Stage3 _create_fp16_sub_groups, once for the decayed and once for the other parameters of Trainer's optimizer; a
    # group is closed by the parameter that reaches the limit, so it may be larger.
    groups = []
    for decayed in (True, False):
        current = 0
        for name, size in trained:
            if bool(re.search(NO_DECAY, name)) is not decayed:
                current += part(size)
                if current >= group_limit:
                    groups.append(current)
                    current = 0
        groups += [current] if current else []
    own = sum(groups)  # trained elements on this rank

    base_bytes = 2 * sum(part(size) for _, size in sizes)  # ZeRO-3 bf16: defragment; or pinned host memory
    if method == "qlora":  # bitsandbytes quantize_4bit: half a byte and one fp32 absmax per 64; the rest stays bf16
        packed = sum(math.prod(shape) for name, shape, linear in shapes if linear and name != HEAD)
        base_bytes = 2 * total - (2 - 0.5 - 4 / 64) * packed
    adapters = 0 if method == "full" else 2 * own
    # Init: parameters up to the threshold stay whole on every GPU once gathered, and are not offloaded.
    persistent = 0 if ranks == 1 else 2 * sum(size for _, size in sizes if size <= threshold)
    host_base = 2 * sum(part(size) for _, size in sizes if size > threshold) if offload_param else 0
    layer_sizes = [size for name, size in sizes if "embed_tokens" not in name and name != HEAD]
    head = math.prod(next(shape for name, shape, _ in shapes if name == HEAD))

    items = {
        "parameters": base_bytes - host_base + adapters + persistent,
        "gradients": grad_bytes * own,  # Stage3 _setup_for_real_optimizer: grad_partitions_flat_buffer
        "fp32 master": 4 * own if method != "qlora" else 0,  # Stage3 _create_fp32_partitions
        # bitsandbytes Optimizer2State.init_state: uint8 m and v and a fp32 absmax per 256; fp32 below 4,096 elements
        "8-bit states": sum(8 * n if n < 4096 else 2 * n + 2 * 4 * math.ceil(n / 256) for n in groups),
        # PartitionedParameterCoordinator._fetch_sub_module_impl: every module call prefetches more, until max_live
        # is reached, past it by one parameter at most; __params_to_release holds back what is needed again within the
        # reuse distance, and since the backward meets weights in the opposite order that is what was used in the last
        # half of it. (The embedding is larger, but gathered before there are activations.) QLoRA: one bf16 weight.
        "live layers": 2 * (min(total, max(max_live, reuse // 2) * (method != "qlora") + max(layer_sizes))),
        # Stage3 ipg_buckets, and the gradient of one more weight in flight (overlap_comm, reduce_scatter_coalesced)
        "buckets": 2 * bucket * (method != "qlora") + 2 * max(layer_sizes) * (method == "full"),
        # Stage3 _prepare_fp32_grad_for_sub_group: flatten in the gradients' type, then a fp32 cast
        "optimizer step": (grad_bytes + 4) * max(groups) * (method != "qlora"),
        # trl _ChunkedLogProbFunction.backward: fp32 gradient of the whole head, its bf16 cast, the gathered head.
        # Logits are those of the answer tokens only, a few a picture: about 1 MB.
        "LM-head backward": {"full": 4 + 2 + 2, "lora": 2, "qlora": 0}[method] * head,
    }
    resident = sum(items[name] for name in ("parameters", "gradients", "fp32 master", "8-bit states"))
    peaks, phases = {}, {}
    for name, count in zip(("median", "largest"), tokens, strict=True):
        acts = activations(config, *(formed if formed and name == "largest" else (micro_batch, count)), method)
        away = acts["kept"] if offload_activations else 0  # transformers _activation_checkpointing_enable: save_on_cpu
        items[f"activations, {name}"] = acts["peak"] - away
        phase = {
            "backward": items["live layers"] + acts["peak"] - away,
            "LM head": items["live layers"] + items["LM-head backward"] + acts["saved"] - away,
            "optimizer step": items["optimizer step"],
        }
        phases[name] = max(phase, key=phase.get)
        peaks[name] = (resident + items["buckets"] + phase[phases[name]]) / GIB + RESERVE
    items["reserve (assumed)"] = RESERVE * GIB

    # Traffic, at most: Stage3 gathers a layer for forward, recompute and backward, unless the reuse distance spans the
    # other weights of a decoder layer twice, from the recompute to the backward; the embedding once, the head twice.
    # Every trained gradient is reduce-scattered once a micro-step. (n-1)/n of each crosses the link of each GPU.
    layer = [size for name, size in sizes if ".layers.0." in name and "vision" not in name and size > threshold]
    passes = 2 if reuse >= 2 * sum(layer[1:]) else 3
    gathers = 0 if method == "qlora" else passes * sum(layer_sizes) + 3 * head  # embedding 1 + head 2
    sent = sum(size for _, size in trained)
    share = (num_gpus - 1) / num_gpus
    link = accumulation * 2 * share * (gathers * (ranks > 1) + sent * (2 if method == "qlora" else 1))
    kept = activations(config, micro_batch, tokens[0])["kept"] if offload_activations else 0
    host = accumulation * (2 * kept + (2 * gathers / ranks if offload_param else 0)) + (2 * own if offload_param else 0)
    kept_largest = activations(config, micro_batch, tokens[1])["kept"] if offload_activations else 0
    pinned = num_gpus * (host_base + kept_largest)
    checkpoint, final = sent * (CHECKPOINT_BYTES + WEIGHT_BYTES), sent * WEIGHT_BYTES
    return {
        "method": method, "num_gpus": num_gpus, "micro_batch": micro_batch, "accumulation": accumulation,
        "effective_batch": micro_batch * accumulation * num_gpus,
        "offload_param": offload_param, "offload_activations": offload_activations,
        "items": {name: size / GIB for name, size in items.items()},
        "resident": resident / GIB, "peaks": peaks, "peak_phase": phases,
        "parameters": total, "trained": sent,
        "host_gib": (2 * total + pinned) / GIB + RANK_RAM * num_gpus,  # rank 0 holds a whole copy to load and to save
        "disk_gb": {
            "checkpoint": checkpoint / 1e9, "kept": save_total_limit + 2, "final": final / 1e9,
            "total": ((save_total_limit + 2) * checkpoint + final) / 1e9,
        },
        "traffic_gb": {"between_gpus": link / 1e9, "host": host / 1e9},
    }  # fmt: skip


def rows(config, zero3, num_gpus, effective_batch, tokens, method, lora_r, counts=None) -> list[dict]:
    """A plan for each micro-batch (1, 2, 4, 8) of the same effective batch: no offload, parameters, activations.

    counts: image tokens of every picture, for --train_sampling_strategy batch_rebalance.
    """
    if num_gpus < 1 or effective_batch < 1 or effective_batch % num_gpus:
        raise UserError(
            f"--effective_batch: found {effective_batch} pictures for --num_gpus {num_gpus}; expected a multiple of "
            f"the GPUs; give one, like {max(1, num_gpus) * 16}"
        )
    each, shapes = effective_batch // num_gpus, parameters(config)
    sizes = [micro for micro in (1, 2, 4, 8) if each % micro == 0]
    formed = {m: largest_micro_batch(counts, m, each // m, num_gpus) for m in sizes} if counts else {}
    return [
        plan(
            config,
            zero3,
            num_gpus,
            micro,
            each // micro,
            tokens,
            offload_param=params,
            offload_activations=acts,
            method=method,
            lora_r=lora_r,
            shapes=shapes,
            formed=formed.get(micro),
        )  # fmt: skip
        for params, acts in ((False, False), (True, False), (False, True))[: 1 if method == "qlora" else 3]
        for micro in sizes
    ]


def traffic(p: dict) -> float:
    return p["traffic_gb"]["between_gpus"] + p["traffic_gb"]["host"]


def recommend(plans: list[dict], limit: float) -> tuple[dict | None, str]:
    """The line with the least traffic a step among those that fit at the largest picture, and why.

    Activation offload is listed but never recommended: it needs a GPU's pinned memory and could not be run here.
    """
    fit = [p for p in plans if p["peaks"]["largest"] <= limit and not p["offload_activations"]]
    if not fit:
        least = min(p["peaks"]["largest"] for p in plans)
        remedy = {
            "full": "more GPUs, --use_peft (LoRA) or --use_peft --load_in_4bit (QLoRA)",
            "lora": "--use_peft --load_in_4bit (QLoRA)",
            "qlora": "a larger GPU",
        }[plans[0]["method"]]
        return None, f"no line stays under {limit:g} GiB at the largest picture, the least is {least:.1f}; use {remedy}"
    best = min(fit, key=lambda p: (round(traffic(p), 1), p["offload_param"], -p["micro_batch"]))
    place = "in host RAM" if best["offload_param"] else "on the GPUs"
    return best, (
        f"{best['micro_batch']} per device x {best['accumulation']} accumulated x {best['num_gpus']} ranks = "
        f"{best['effective_batch']} pictures a step, parameters {place}: "
        f"{best['peaks']['largest']:.1f} GiB at the largest picture; of {len(fit)} lines under "
        f"{limit:g} GiB it moves the least, {traffic(best):.0f} GB a GPU and step"
    )


def table(plans: list[dict], limit: float) -> str:
    """One column a plan, one row an item."""
    line = lambda name, cells: f"{name:27s}" + "".join(f"{cell:>8}" for cell in cells)  # noqa: E731
    offload = lambda p: "params" if p["offload_param"] else "activ." if p["offload_activations"] else "-"  # noqa: E731
    out = [line("micro-batch x accumulation", [f"{p['micro_batch']}x{p['accumulation']}" for p in plans])]
    out += [line("offloaded to host RAM", [offload(p) for p in plans])]
    out += [line("  " + name, [f"{p['items'][name]:.2f}" for p in plans]) for name in plans[0]["items"]]
    for name in ("median", "largest"):
        out.append(line(f"peak at the {name}", [f"{p['peaks'][name]:.1f}" for p in plans]))
    out.append(line(f"fits in {limit:g} GiB", ["yes" if p["peaks"]["largest"] <= limit else "NO" for p in plans]))
    out.append(line("host RAM, all ranks", [f"{p['host_gib']:.0f}" for p in plans]))
    out.append(line("GB a step between GPUs", [f"{p['traffic_gb']['between_gpus']:.0f}" for p in plans]))
    out.append(line("GB a step to/from host", [f"{p['traffic_gb']['host']:.0f}" for p in plans]))
    return "\n".join(out)
