"""How much memory, host RAM, disk and traffic a training run takes, computed from config.json before any weight loads.

Computed, not measured: no GPU was at hand. tests/test_memory_plan.py holds bytes, live weights and traffic against
train.py itself on two CPU ranks of ZeRO-3, the activations against a fake-tensor trace of the real model. Each formula
names the library function that it models (torch 2.13, transformers 5.23, trl 1.16, deepspeed 0.19.8, bitsandbytes
0.50.2, peft 0.21). GiB are 2**30 bytes, GB are 10**9.

A plan is what plan() returns:
  method "full" | "lora" | "lora_ddp" | "qlora" | "ddp" · num_gpus · micro_batch · accumulation · effective_batch ·
  offload_param · offload_activations · items {name: GiB on each GPU} · resident · peaks {"median", "largest": GiB} ·
  peak_phase · host_gib {"start", "training", "resume", "validation": GiB, all ranks} ·
  disk_gb {"checkpoint", "kept", "final", "total"} · traffic_gb {"between_gpus", "host", per GPU and step}
"""

import contextlib
import dataclasses
import json
import math
import re
from pathlib import Path

import psutil

from animals.checkpoint.tokens import Geometry, image_token_count
from animals.checkpoint.view import model_class, model_config
from animals.command import UserError
from animals.training.batches import TEXT_TOKENS, largest_micro_batch
from animals.training.parts import PARTS, trains

GIB = 2**30
RESERVE = 0.8  # GiB, an assumption, not computed: CUDA context, cuBLAS workspace, NCCL buffers (reports say 0.7 to 1)
MARGIN = 1.5  # GiB that a plan leaves free for fragmentation: 24 -> 22.5
RANK_RAM = 3.0  # GiB of host RAM a rank for Python, libraries, CUDA and its data workers; an assumption
CHECKPOINT_BYTES = 6.04  # a trained parameter in global_step*/: fp32 master 4, 8-bit m and v 2.03, rest
WEIGHT_BYTES = 2.01  # a parameter in bf16 safetensors
TYPICAL_TOKENS, LARGEST_TOKENS = 1368, 2928  # image_tokens() of a 300x225 picture, and the most that there can be
HEAD, LANGUAGE = "lm_head.weight", ".language_model."
RESIDENT = "parameters", "gradients", "fp32 master", "8-bit states"
NO_DECAY = r"bias|layernorm|layrnorm|layer_norm|(?:^|\.)norm\."  # as Trainer.get_decay_parameter_names


def method_of(zero3: bool, adapters: bool, four_bit: bool) -> str:
    """The plan's method for these settings of a run."""
    if adapters:
        return "qlora" if four_bit else "lora" if zero3 else "lora_ddp"
    return "full" if zero3 else "ddp"


def load_config(folder: str, view: str = "tiles"):
    """The LlavaNextConfig, or for the whole view LlavaConfig, of a model folder or a config.json file."""
    file = Path(folder) / "config.json" if Path(folder).is_dir() else Path(folder)
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: found {error}; expected the model's config.json; give --model_name_or_path") from None
    if values.get("model_type") not in ("llava_next", "llava"):
        found = values.get("model_type")
        raise UserError(f"{file}: found model_type {found!r}; expected llava_next; give another --model_name_or_path")
    return model_config(file, view)


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

    with torch.device("meta"):
        model = model_class(config)(config)
    linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    return [(n, tuple(p.shape), n in linear) for n, p in model.named_parameters()]


def image_tokens(config, height: int, width: int) -> int:
    """Tokens of one picture as its processor counts them; config: LlavaNextConfig, or the whole view's LlavaConfig."""
    vision = config.vision_config
    pinpoints = () if config.model_type == "llava" else config.image_grid_pinpoints
    return image_token_count(width, height, Geometry(vision.image_size, vision.patch_size, pinpoints))


def token_counts(config, temp_dir: str) -> dict:
    """Image tokens of the median and the largest picture in <temp_dir>/train.json, else the documented assumption."""
    file = Path(temp_dir) / "train.json"
    if not file.exists():
        source = f"assumed: {file} is not there yet (300x225 pictures, and the largest that there can be)"
        typical, largest = image_tokens(config, 225, 300), LARGEST_TOKENS if config.model_type != "llava" else 0
        return {"median": typical, "largest": max(typical, largest), "source": source}
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
    if config.model_type == "llava":
        return 1
    side = size // config.vision_config.patch_size
    grids = sorted(h // size * (w // size) for h, w in config.image_grid_pinpoints)
    return 1 + grids[0 if tokens <= (grids[0] + 1) * side * side + grids[0] * side else -1]


def activations(config, micro_batch: int, tokens: int, method="full", text_tokens=TEXT_TOKENS, parts=PARTS) -> dict:
    """Bytes with activation checkpointing and SDPA; `tokens` are the picture's. A trace agrees within 10 % (tests).

    parts: those whose weights train. With "ddp" these are float32, and so is the residual stream between their layers.
    kept: inputs of the checkpointed layers (torch.utils.checkpoint); what activation offload moves to the host.
    saved: all that lives when the forward ends, kept included. peak: in the backward of the last decoder layer.
    """
    text, tower = config.text_config, config.vision_config
    hidden, wide = text.hidden_size, text.intermediate_size
    n = micro_batch * (tokens + text_tokens)  # decoder positions
    tiles = micro_batch * tiles_of(config, tokens)
    patches = tiles * ((tower.image_size // tower.patch_size) ** 2 + 1)  # with CLS
    # A frozen tower's checkpoints keep their inputs too, unless reentrant, as TRL makes them for LoRA on ZeRO-3.
    held, trained = patches * (method != "lora"), patches * ("vision" in parts)
    stream, seen = (4 if method == "ddp" and part in parts else 2 for part in ("language", "vision"))  # bytes
    kept = stream * n * hidden * text.num_hidden_layers + seen * held * tower.hidden_size * tower.num_hidden_layers
    saved = kept + seen * 3 * tiles * tower.image_size**2 + 2 * seen * trained * tower.hidden_size  # CLIP's embeddings
    saved += 2 * 2 * patches * hidden + 2 * patches * tower.hidden_size  # LlavaNextMultiModalProjector: GELU, input
    saved += (stream + 4 + stream) * n * hidden  # last hidden state, MistralRMSNorm in fp32 and in the stream's type
    # MistralDecoderLayer, recomputed: two norms of fp32 4 + stream 2 + 2; q 2, attention out 2, gradient 2: 22 B x
    # hidden, less the final norm's 8, freed by then; k and v 4 B x their heads, not repeated (no mask: trainer.py).
    # MistralMLP: gate, silu, up, and the gradients of silu, up and their product: 6 x 2 B x intermediate.
    grouped = hidden * text.num_key_value_heads // text.num_attention_heads
    peak = saved + n * ((8 + 3 * stream) * hidden + 4 * grouped + 12 * wide)
    if "lora" in method:  # peft Linear.forward, at most: fp32 copy 4, dropout 4, its mask 1 of each input
        peak += 9 * n * (6 * hidden + wide)
    return {"kept": kept, "saved": saved, "peak": peak}


@dataclasses.dataclass
class Run:
    """What is planned, and what follows from it: elements of one rank unless named otherwise."""

    config: object
    zero3: dict
    num_gpus: int
    micro_batch: int
    accumulation: int
    tokens: tuple  # image tokens of the (median, largest) picture
    offload_param: bool
    offload_activations: bool
    method: str
    lora_r: int
    shapes: list  # parameters(config)
    formed: tuple | None
    text_tokens: int
    parts: list  # of the model that train; LoRA: all

    def __post_init__(self):
        self.sharded = self.method in ("full", "lora")  # ZeRO-3; else the whole base on each GPU
        self.masters = self.method in ("ddp", "lora_ddp")  # what trains is float32: parts.py, peft; QLoRA's is bf16
        self.offload_param &= self.sharded
        self.ranks = self.num_gpus if self.sharded else 1  # that share one copy
        self.sizes = [(name, math.prod(shape)) for name, shape, _ in self.shapes]
        self.total = sum(size for _, size in self.sizes)
        self.head = next(size for name, size in self.sizes if name == HEAD)
        self.layers = [size for name, size in self.sizes if "embed_tokens" not in name and name != HEAD]
        self.trained = [(name, size) for name, size in self.sizes if trains(name, self.parts, self.config)]
        if "lora" in self.method:  # peft LoraLayer: A (r x in) and B (out x r) beside each of lora.py's LORA_TARGETS
            linear = [(name, shape) for name, shape, is_linear in self.shapes if is_linear and LANGUAGE in name]
            self.trained = [(name, self.lora_r * side) for name, shape in linear for side in reversed(shape)]
        self.groups = self.sub_groups()
        self.own = sum(self.groups)
        self.gradient = 4 if self.zero3.get("data_types", {}).get("grad_accum_dtype") == "fp32" else 2  # bytes
        hidden = self.config.text_config.hidden_size
        self.threshold = self.setting("stage3_param_persistence_threshold", 1e5, 10 * hidden)
        self.bucket = self.setting("reduce_bucket_size", 5e8, hidden * hidden)
        self.max_live = self.setting("stage3_max_live_parameters", 1e9, 1e9)
        self.reuse = self.setting("stage3_max_reuse_distance", 1e9, 1e9)

    def setting(self, name, default, auto):
        """Of ZeRO-3: DeepSpeedZeroConfig's default; "auto" as in HfTrainerDeepSpeedConfig.trainer_config_finalize."""
        value = self.zero3["zero_optimization"].get(name, default)
        return int(auto if value == "auto" else value)

    def part(self, size):
        """Init._aligned_size: padded to a multiple of the ranks."""
        return math.ceil(size / self.ranks)

    def sub_groups(self):
        """Stage3 _create_fp16_sub_groups, once for decayed and once for other parameters of Trainer's optimizer.

        A group is closed by the parameter that reaches the limit, so it may be larger.
        """
        groups, limit = [], self.setting("sub_group_size", 1e9, 1e9) if self.sharded else 1
        for decayed in (True, False):
            current = 0
            for name, size in self.trained:
                if bool(re.search(NO_DECAY, name)) is not decayed:
                    current += self.part(size)
                    if current >= limit:
                        groups.append(current)
                        current = 0
            groups += [current] if current else []
        return groups

    def activations(self, which):
        """activations() of the micro-batch with the most tokens; which: "median" or "largest"."""
        batch = self.micro_batch, self.tokens[which == "largest"]
        if self.formed and which == "largest":
            batch = self.formed
        parts = self.parts if self.method in ("full", "ddp") else ()
        return activations(self.config, *batch, self.method, self.text_tokens, parts)


def base_bytes(run) -> tuple[int, int]:
    """Bytes of the model's own weights on each (GPU, rank's pinned host memory)."""
    if run.masters:
        return 2 * run.total, 0
    if run.method == "qlora":  # bitsandbytes quantize_4bit: half a byte and one fp32 absmax per 64; the rest is bf16
        packed = sum(math.prod(shape) for name, shape, linear in run.shapes if linear and LANGUAGE in name)
        return 2 * run.total - (2 - 0.5 - 4 / 64) * packed, 0
    # Init: parameters up to the threshold stay whole on every GPU once gathered, and are not offloaded.
    whole = 0 if run.ranks == 1 else 2 * sum(size for _, size in run.sizes if size <= run.threshold)
    every = 2 * sum(run.part(size) for _, size in run.sizes)
    host = 2 * sum(run.part(size) for _, size in run.sizes if size > run.threshold) if run.offload_param else 0
    return every - host + whole, host


def gpu_items(run) -> dict:
    """Bytes on each GPU, by item."""
    added = {"full": 0, "lora_ddp": 4}.get(run.method, 2) * run.own  # adapters; "ddp": float32 instead of bf16
    largest = max(run.layers)
    head = any(name == HEAD for name, _ in run.trained)
    ddp = 4 * run.own * run.masters  # bytes of the trained weights
    weights = [size for name, size in run.trained if "embed_tokens" not in name and name != HEAD]
    buckets = 2 * run.bucket + 2 * max(weights) * (run.method == "full")
    items = {
        "parameters": base_bytes(run)[0] + added,  # Stage3 defragment: bf16
        "gradients": ddp or run.gradient * run.own,  # Stage3 _setup_for_real_optimizer: grad_partitions_flat_buffer
        "fp32 master": 4 * run.own * run.sharded,  # Stage3 _create_fp32_partitions
        # bitsandbytes Optimizer2State.init_state: uint8 m and v and a fp32 absmax per 256; fp32 below 4,096 elements
        "8-bit states": sum(8 * n if n < 4096 else 2 * n + 2 * 4 * math.ceil(n / 256) for n in run.groups),
        # PartitionedParameterCoordinator._fetch_sub_module_impl: every module call prefetches more, until max_live
        # is reached, past it by one parameter at most; __params_to_release holds back what is needed again within the
        # reuse distance, and since the backward meets weights in the opposite order that is what was used in the last
        # half of it. (The embedding is larger, but gathered before there are activations.) QLoRA: one bf16 weight. DDP:
        # the bf16 copies of the trained weights that autocast keeps.
        "live layers": ddp // 2 or 2 * min(run.total, max(run.max_live, run.reuse // 2) * run.sharded + largest),
        # Stage3 ipg_buckets, and the gradient of one more weight in flight (overlap_comm, reduce_scatter_coalesced);
        # DDP's Reducer copies the gradients
        "buckets": buckets * run.sharded + ddp,
        # Stage3 _prepare_fp32_grad_for_sub_group: flatten in the gradients' type, then a fp32 cast
        "optimizer step": (run.gradient + 4) * max(run.groups) * run.sharded,
        # trl _ChunkedLogProbFunction.backward: fp32 gradient of the whole head, its bf16 cast, the gathered head, which
        # goes before the layers' backward (trainer.py). Logits are those of the answer tokens only: about 1 MB.
        "LM-head backward": ((4 + 2) * (head and run.method in ("full", "ddp")) + 2 * run.sharded) * run.head,
    }
    for which in ("median", "largest"):
        found = run.activations(which)  # transformers _activation_checkpointing_enable: save_on_cpu takes what is kept
        items[f"activations, {which}"] = found["peak"] - run.offload_activations * found["kept"]
    return items | {"reserve (assumed)": RESERVE * GIB}


def gpu_peak(run, items, which) -> tuple[float, str]:
    """(GiB, phase) of the highest moment of a step with the median or the largest picture."""
    always = sum(items[name] for name in (*RESIDENT, "buckets", "reserve (assumed)"))
    found = run.activations(which)
    saved = found["saved"] - run.offload_activations * found["kept"]
    phases = {
        "backward": items["live layers"] + items[f"activations, {which}"],
        "LM head": items["live layers"] + items["LM-head backward"] + saved,
        "optimizer step": items["optimizer step"],
    }
    phase = max(phases, key=phases.get)
    return (always + phases[phase]) / GIB, phase


def host_ram(run) -> dict:
    """GiB of host RAM, all ranks together, in each phase."""
    pinned = run.num_gpus * base_bytes(run)[1]
    weights, apiece = 2 * run.total, 2 * run.part(max(size for _, size in run.sizes))
    kept = run.num_gpus * run.offload_activations * activations(run.config, run.micro_batch, run.tokens[1])["kept"]
    # A rank's file of the optimizer's states, and the copy of the 8-bit ones that bitsandbytes' load_state_dict makes;
    # rank after rank where DeepSpeed's pipeline_loading_checkpoint is on.
    load = (CHECKPOINT_BYTES + 2.03) * run.own
    load *= 1 if run.zero3["zero_optimization"].get("pipeline_loading_checkpoint") else run.num_gpus
    used = {
        # ZeRO-3: rank 0 reads all shards and partitions are pinned one by one; then each again in a flat buffer
        # (Stage3 _move_to_flat_buffer). Without ZeRO-3 tensor after tensor goes to the GPU.
        "start": max(weights + pinned, 2 * pinned) if run.sharded else run.num_gpus * apiece,
        "training": pinned + kept + weights * (run.method == "full"),  # rank 0 holds a whole copy to save
        "resume": pinned + load,
        "validation": run.num_gpus * apiece,  # load_model(): as without ZeRO-3
    }
    return {phase: value / GIB + RANK_RAM * run.num_gpus for phase, value in used.items()}


def traffic_gb(run) -> dict:
    """GB a GPU and step, at most.

    Stage3 gathers a layer for forward, recompute and backward, unless the reuse distance spans the other weights of a
    decoder layer twice, from the recompute to the backward; embedding once, head twice. Every trained gradient is
    reduce-scattered once a micro-step. (n-1)/n of each crosses the link of each GPU. DDP all-reduces the gradients, in
    their own type and there and back, once a step (Trainer's no_sync).
    """
    layer = [n for name, n in run.sizes if ".layers.0." in name and "vision" not in name and n > run.threshold]
    passes = 2 if run.reuse >= 2 * sum(layer[1:]) else 3
    gathers = (passes * sum(run.layers) + 3 * run.head) * run.sharded
    trained = sum(size for _, size in run.trained)
    share = (run.num_gpus - 1) / run.num_gpus
    if run.sharded:
        link = run.accumulation * 2 * share * (gathers + trained)
    else:
        link = (4 if run.masters else 2) * 2 * share * trained
    kept = run.offload_activations * activations(run.config, run.micro_batch, run.tokens[0])["kept"]
    weights = 2 * gathers / run.ranks * run.offload_param
    host = run.accumulation * (2 * kept + weights) + 2 * run.own * run.offload_param
    return {"between_gpus": link / 1e9, "host": host / 1e9}


def plan(
    config, zero3: dict, num_gpus: int = 4, micro_batch: int = 4, accumulation: int = 4,
    tokens: tuple[int, int] = (TYPICAL_TOKENS, LARGEST_TOKENS), *, offload_param: bool | None = None,
    offload_activations: bool = False, method: str = "full", lora_r: int = 16, save_total_limit: int = 5,
    shapes: list | None = None, formed: tuple[int, int] | None = None, text_tokens: int = TEXT_TOKENS,
    parts: list[str] = tuple(PARTS),
) -> dict:  # fmt: skip
    """The plan of one run as a dict (keys: module docstring).

    config: LlavaNextConfig. zero3: the parsed DeepSpeed file, "auto" as transformers fills it. tokens: image tokens of
    the (median, largest) picture; text_tokens: those around it. offload_param: None = as zero3 says. method: "full",
    "lora" (bf16 base, partitioned), and whole on each GPU "lora_ddp" (bf16 base), "qlora" (NF4 base) or "ddp" (bf16,
    but for float32 in what trains). parts: of the model, those that train. shapes: parameters(config), to build the
    model once for many plans. formed: (pictures, tokens of the longest) of the largest micro-batch that
    batch_rebalance forms (batches.py); None for other samplers, which may put micro_batch of the largest together.
    """
    if offload_param is None:
        offload_param = (zero3["zero_optimization"].get("offload_param") or {}).get("device", "none") != "none"
    shapes = shapes or parameters(config)
    run = Run(
        config, zero3, num_gpus, micro_batch, accumulation, tokens, offload_param, offload_activations, method, lora_r,
        shapes, formed, text_tokens, parts,
    )  # fmt: skip
    items = gpu_items(run)
    peaks = {which: gpu_peak(run, items, which) for which in ("median", "largest")}
    trained = sum(size for _, size in run.trained)
    final = (trained if "lora" in method else run.total) * WEIGHT_BYTES / 1e9
    checkpoint = trained * CHECKPOINT_BYTES / 1e9 + final
    kept = save_total_limit + 2
    return {
        "method": method, "num_gpus": num_gpus, "micro_batch": micro_batch, "accumulation": accumulation,
        "effective_batch": micro_batch * accumulation * num_gpus,
        "offload_param": run.offload_param, "offload_activations": offload_activations,
        "items": {name: size / GIB for name, size in items.items()},
        "resident": sum(items[name] for name in RESIDENT) / GIB,
        "peaks": {which: peak for which, (peak, _) in peaks.items()},
        "peak_phase": {which: phase for which, (_, phase) in peaks.items()},
        "parameters": run.total, "trained": trained, "host_gib": host_ram(run), "traffic_gb": traffic_gb(run),
        "disk_gb": {"checkpoint": checkpoint, "kept": kept, "final": final, "total": kept * checkpoint + final},
    }  # fmt: skip


def usable_ram(own="/proc/self/cgroup", cgroups="/sys/fs/cgroup") -> int:
    """Bytes of this machine's RAM, or fewer where a container is limited, of which psutil knows nothing.

    A limit on any group around this process counts. Within a container its own group may be the root that it sees.
    """
    limits = [psutil.virtual_memory().total]
    with contextlib.suppress(OSError):  # no cgroups: not Linux
        for line in Path(own).read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            root, name = ("memory", "memory.limit_in_bytes") if controllers else ("", "memory.max")  # version 1, 2
            inside = Path(group.strip("/"))
            for folder in (inside, *inside.parents):
                with contextlib.suppress(OSError, ValueError):  # not there; "max"
                    limits.append(int(Path(cgroups, root, folder, name).read_text()))
    return min(limits)


def check_host(plan: dict, ranks: int) -> None:
    """This machine's RAM is enough for its `ranks`' share of the plan in every phase."""
    found = usable_ram() / GIB
    share = ranks / plan["num_gpus"]
    if short := {phase: gib * share for phase, gib in plan["host_gib"].items() if gib * share > found}:
        phases = ", ".join(f"{gib:.0f} GiB for {phase}" for phase, gib in short.items())
        raise UserError(
            f"found {found:.0f} GiB of RAM; expected {phases} (computed); take a machine with more, fewer ranks, or "
            "LoRA (--use_peft)"
        )


def rows(
    config, zero3, num_gpus, effective_batch, tokens, method, lora_r, counts=None, parts=tuple(PARTS)
) -> list[dict]:
    """A plan for each micro-batch (1, 2, 4, 8, 16) of the same effective batch: no offload, parameters, activations.

    counts: image tokens of every picture, for --train_sampling_strategy batch_rebalance.
    """
    if num_gpus < 1 or effective_batch < 1 or effective_batch % num_gpus:
        raise UserError(
            f"--effective_batch: found {effective_batch} pictures for --num_gpus {num_gpus}; expected a multiple of "
            f"the GPUs; give one, like {max(1, num_gpus) * 16}"
        )
    each, shapes = effective_batch // num_gpus, parameters(config)
    sizes = [micro for micro in (1, 2, 4, 8, 16) if each % micro == 0]
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
            parts=parts,
        )  # fmt: skip
        for params, acts in ((False, False), (True, False), (False, True))[: 3 if method in ("full", "lora") else 1]
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
            "lora_ddp": "ZeRO-3, which divides the weights, or --load_in_4bit (QLoRA)",
            "qlora": "a larger GPU",
            "ddp": "ZeRO-3, which divides the weights, or --use_peft --load_in_4bit (QLoRA)",
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
    for phase in plans[0]["host_gib"]:
        out.append(line(f"host RAM, {phase}", [f"{p['host_gib'][phase]:.0f}" for p in plans]))
    out.append(line("GB a step between GPUs", [f"{p['traffic_gb']['between_gpus']:.0f}" for p in plans]))
    out.append(line("GB a step to/from host", [f"{p['traffic_gb']['host']:.0f}" for p in plans]))
    return "\n".join(out)
