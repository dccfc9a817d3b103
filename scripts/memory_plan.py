"""Which machine do I need? GPU memory, host RAM and disk of every way to train, computed from config.json.

    python scripts/memory_plan.py                                 # the table of all: every method, 1, 4 and 8 GPUs
    python scripts/memory_plan.py --num_gpus 1 --method ddp --train_parts projector --micro_batch 4 --json
    python scripts/memory_plan.py --num_gpus 4 --method full --micro_batch 8 --offload both

It needs neither weights nor a GPU and refuses nothing; `sh train.sh --rehearse` measures. tests/test_memory_plan.py
holds what is resident against train.py on CPU ranks (2 %), the activations against a trace of the real model (10 %).
Each formula names the library function that it follows, as requirements.txt pins it. GiB: 2**30 bytes, GB: 10**9.
"""

import json
import math
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from animals.checkpoint.family import model_class, model_config
from animals.checkpoint.image_tokens import Geometry, image_token_count
from animals.command import Parser, UserError, run
from animals.files import looked_up, read_json
from animals.training.lora import LORA_TARGETS
from animals.training.parts import NAMED, PARTS, read_parts, trains
from animals.training.recipes import OFFLOAD

DDP = "--config_file scripts/ddp.yaml"
METHODS = {  # name: flags of train.sh
    "full": "",
    "lora": "--use_peft --learning_rate 2e-4",
    "lora_ddp": f"--use_peft --learning_rate 2e-4 {DDP}",
    "qlora": f"--use_peft --learning_rate 2e-4 --load_in_4bit {DDP}",
    "ddp": f"--learning_rate 1e-3 {DDP}",
}
SHARDED = "full", "lora"  # ZeRO-3 divides the model among the GPUs; otherwise each GPU holds all of it
RESIDENT = "parameters", "gradients", "fp32 master", "8-bit states"
GIB = 2**30
RESERVE = 0.8 * GIB  # an assumption: CUDA context, cuBLAS workspace, NCCL buffers (reports say 0.7 to 1 GiB)
RANK_RAM = 3 * GIB  # an assumption: host RAM of one rank for Python, the libraries, CUDA and its data workers
TEXT_TOKENS = 60  # an assumption: prompt, answer and </s> beside the picture's tokens
LORA_R = 16  # train.py's default rank of the adapters
CHECKPOINT_BYTES, WEIGHT_BYTES = 6.04, 2.01  # on disk: per trained parameter (fp32 master, m, v); per bf16 weight
HEAD = "lm_head.weight"
ADAPTED = re.compile(rf"{LORA_TARGETS}\.weight")  # what LoRA puts adapters beside, and QLoRA holds in 4 bits
NO_DECAY = r"bias|layernorm|layrnorm|layer_norm|(?:^|\.)norm\."  # transformers Trainer.get_decay_parameter_names


def load_config(path):
    """The transformers config of a checkpoint folder or of a config.json file."""
    file = Path(path, "config.json") if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(
            f"{looked_up(file)}: found no such file; expected the model's config.json; get it as model/README.md says"
        )
    return model_config(file)


def parameters(config) -> dict[str, tuple]:
    """{name: shape} of every parameter, in the model's order. The model is built on the meta device: no memory."""
    import torch

    with torch.device("meta"):
        model = model_class(config)(config)
    return {name: tuple(value.shape) for name, value in model.named_parameters()}


def views(config) -> dict[str, tuple[int, int]]:
    """{what is seen: (image tokens, tiles) per picture}: two sizes of picture in tiles, and the whole view."""
    from transformers.image_processing_utils import select_best_resolution

    side = config.vision_config.image_size
    seen, whole = {}, Geometry(side, config.vision_config.patch_size, ())
    if config.model_type == "llava_next":
        grids = tuple(map(tuple, config.image_grid_pinpoints))  # (height, width)
        tiled = whole._replace(pinpoints=grids)
        largest = max(grids, key=lambda grid: image_token_count(grid[1], grid[0], tiled))
        for name, (height, width) in (("300x225", (225, 300)), ("largest", largest)):
            best = select_best_resolution((height, width), grids)
            seen[name] = image_token_count(width, height, tiled), 1 + best[0] * best[1] // side**2
    return seen | {"whole view": (image_token_count(side, side, whole), 1)}


def activations(config, micro_batch, tokens, tiles, method, parts, offload=False) -> dict:
    """Bytes on a GPU with activation checkpointing and SDPA: {"saved": when the forward ends, "peak": at most}.

    tokens, tiles: of each picture. parts: those whose weights train. With "ddp" they are float32, and so is the
    residual stream between their layers. The peak is in the last decoder layer's backward. offload: the layers' inputs
    wait in host RAM, "host" bytes, 0 without it.
    """
    text, tower = config.text_config, config.vision_config
    hidden, wide = text.hidden_size, text.intermediate_size
    n, tiles = micro_batch * (tokens + TEXT_TOKENS), micro_batch * tiles  # decoder positions; of the whole batch
    patches = tiles * ((tower.image_size // tower.patch_size) ** 2 + 1)  # with CLS
    # torch.utils.checkpoint keeps each layer's input; in a frozen tower too, but not for LoRA on ZeRO-3, where TRL
    # makes the checkpoints reentrant.
    held, trained = patches * (method != "lora" or "vision" in parts), patches * ("vision" in parts)
    stream, seen = (4 if method not in SHARDED and part in parts else 2 for part in ("language", "vision"))  # bytes
    inputs = stream * n * hidden * text.num_hidden_layers + seen * held * tower.hidden_size * tower.num_hidden_layers
    # transformers activation_checkpointing_enable(offload): torch's save_on_cpu copies the inputs to pinned memory, and
    # one layer's back to the GPU when it is recomputed.
    saved = 0 if offload else inputs
    saved += seen * 3 * tiles * tower.image_size**2 + 2 * seen * trained * tower.hidden_size  # CLIP's embeddings
    saved += 2 * 2 * patches * hidden + 2 * patches * tower.hidden_size  # LlavaNextMultiModalProjector: GELU, input
    saved += (stream + 4 + stream) * n * hidden  # last hidden state, MistralRMSNorm in fp32 and in the stream's type
    # MistralDecoderLayer, recomputed: two norms of fp32 4 + stream 2 + 2; q 2, attention out 2, gradient 2: 22 bytes x
    # hidden, minus the final norm's 8, which are free by then; k and v 4 bytes x their heads, not repeated, since there
    # is no mask. MistralMLP: gate, silu, up, and the gradients of silu, up and their product: 6 x 2 x intermediate.
    grouped = hidden * text.num_key_value_heads // text.num_attention_heads
    peak = saved + n * ((8 + 3 * stream) * hidden + 4 * grouped + 12 * wide) + stream * n * hidden * offload
    if "lora" in method:  # peft Linear.forward, at most: fp32 copy 4, dropout 4 and its mask 1 of each input
        peak += 9 * n * (6 * hidden + wide)
    return {"saved": saved, "peak": peak, "host": inputs * offload}


def trained_weights(config, shapes, method, parts) -> dict[str, int]:
    """{name: elements} of what gets gradients; an adapter by its side and the name of the weight beside it."""
    whole = {name: math.prod(shape) for name, shape in shapes.items() if trains(name, parts, config)}
    linear = {name: shape for name, shape in shapes.items() if "lora" in method and ADAPTED.fullmatch(name)}
    return whole | {f"{side} {name}": LORA_R * shape[side] for name, shape in linear.items() for side in (1, 0)}  # A, B


def gpu_items(config, shapes, zero3, method, num_gpus, parts) -> tuple[dict, float, float]:
    """({item: bytes on each GPU}, bytes of weights in one rank's pinned host RAM, trained elements of one rank)."""
    stage3, sharded = zero3["zero_optimization"], method in SHARDED
    ranks = num_gpus if sharded else 1  # that share one copy of the model
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    trained = trained_weights(config, shapes, method, parts)
    own, adapters = (sum(n for name, n in trained.items() if side in name) / ranks for side in ("", " "))
    base = 2 * sum(sizes.values()) / ranks  # DeepSpeed Init; norms and biases, complete on each GPU, are 1 MB: left out
    host = base if sharded and stage3.get("offload_param", {}).get("device", "none") != "none" else 0
    if method == "qlora":  # bitsandbytes quantize_4bit: half a byte and one fp32 absmax per 64 elements; the rest bf16
        base -= (2 - 0.5 - 4 / 64) * sum(size for name, size in sizes.items() if ADAPTED.fullmatch(name))
    added = (4 if method == "lora_ddp" else 2) * adapters + (0 if sharded else 2 * (own - adapters))
    masters = sharded or method == "qlora" and own == adapters  # then what trains is in bf16
    float32 = 0 if masters else 4 * own  # bytes of trained weights
    # What the optimizer sees: each tensor; with ZeRO-3 one rank's flat share of the decayed ones and of the others.
    decayed = sum(size for name, size in trained.items() if not re.search(NO_DECAY, name)) / ranks
    tensors = [decayed, own - decayed] if sharded else trained.values()
    inner = [name for name in sizes if name != HEAD and "embed_tokens" not in name]
    largest = max(sizes[name] for name in inner)
    flying = max(trained.get(name, 0) for name in inner) if sharded else 0
    head = (4 + 2) * (method in ("full", "ddp") and HEAD in trained) + 2 * sharded
    live = max(int(stage3["stage3_max_live_parameters"]), int(stage3["stage3_max_reuse_distance"]) // 2) * sharded
    items = {
        # Stage3 defragment: bf16. Adapters come on top; DDP holds float32 instead of bf16 (parts.py).
        "parameters": base - host + added,
        "gradients": float32 or 2 * own,  # Stage3 _setup_for_real_optimizer: grad_partitions_flat_buffer
        "fp32 master": 4 * own * sharded,  # Stage3 _create_fp32_partitions
        # bitsandbytes Optimizer2State.init_state: uint8 m and v and a fp32 absmax per 256; fp32 below 4,096 elements
        "8-bit states": sum(8 * n if n < 4096 else 2 * n + 2 * 4 * n / 256 for n in tensors),
        # PartitionedParameterCoordinator._fetch_sub_module_impl prefetches until max_live is reached, past it by one
        # parameter at most; __params_to_release holds back what is needed again within the reuse distance: in the
        # backward, what was used in the last half of it. QLoRA: one bf16 weight. DDP: autocast's bf16 copies.
        "live layers": float32 // 2 or 2 * min(sum(sizes.values()), live + largest),
        # Stage3 ipg_buckets, and the gradient of one more weight on its way; DDP's Reducer copies the gradients
        "buckets": 2 * (int(stage3["reduce_bucket_size"]) + flying) * sharded + float32,
        # Stage3 _prepare_fp32_grad_for_sub_group: flatten in bf16, then a fp32 cast; a group may end past its limit
        "optimizer step": (2 + 4) * min(own, int(stage3["sub_group_size"]) + max(trained.values()) / ranks) * sharded,
        # trl _ChunkedLogProbFunction.backward: fp32 gradient of the head, its bf16 cast, the gathered head, which is
        # released before the layers' backward (trainer.py). The logits are the answer tokens' alone: about 1 MB.
        "LM-head backward": head * sizes[HEAD],
        "reserve (assumed)": RESERVE,
    }
    return items, host, own


def plan(config, shapes, zero3, method, num_gpus, micro_batch, parts, offload=False) -> dict:
    """What one command needs: *_gib on each GPU, host_gib of all ranks at the worst moment. shapes: parameters().

    zero3: the content of zero3.json or zero3_gpu.json. offload: whether the layers' inputs wait in host RAM.
    """
    items, host, own = gpu_items(config, shapes, zero3, method, num_gpus, parts)
    sizes, sharded, pinned = [math.prod(shape) for shape in shapes.values()], method in SHARDED, num_gpus * host
    total, trained = sum(sizes), sum(trained_weights(config, shapes, method, parts).values())
    always = sum(items[name] for name in (*RESIDENT, "buckets", "reserve (assumed)"))
    held, peaks, waiting = {}, {}, []
    for view, (tokens, tiles) in views(config).items():
        found = activations(config, micro_batch, tokens, tiles, method, parts, offload)
        waiting.append(num_gpus * found["host"])
        held[view] = found["peak"] / GIB
        layers = items["live layers"] + max(found["peak"], items["LM-head backward"] + found["saved"])
        peaks[view] = (always + max(layers, items["optimizer step"])) / GIB
    ram = (
        # Start: rank 0 reads all shards while partitions are pinned one by one; then each once more in a flat buffer
        # (Stage3 _move_to_flat_buffer). Without ZeRO-3 tensor after tensor goes to the GPU.
        max(2 * total + pinned, 2 * pinned) if sharded else num_gpus * 2 * max(sizes),
        # Resume: a rank's states and bitsandbytes' copy of the 8-bit ones; with ZeRO-3 one rank at a time (zero3.json).
        pinned + (CHECKPOINT_BYTES + 2.03) * own * (1 if sharded else num_gpus),
        pinned + max(waiting),  # while training
    )
    disk = (trained if "lora" in method else total) * WEIGHT_BYTES + trained * CHECKPOINT_BYTES
    # 1e-3 is the projector's rate
    flags = DDP if method == "ddp" and {"language", "attention"} & {*parts} else METHODS[method]
    words = ["sh train.sh", flags, "" if list(parts) in (list(PARTS), []) else f"--train_parts {','.join(parts)}"]
    words.append("--config_file scripts/deepspeed_zero3_gpu.yaml" if sharded and not host else "")
    words.append(OFFLOAD if offload else "")
    return {
        "method": method, "command": " ".join(filter(None, words)), "num_gpus": num_gpus, "micro_batch": micro_batch,
        "parameters": total, "trained": trained, "items_gib": {name: size / GIB for name, size in items.items()},
        "resident_gib": sum(items[name] for name in RESIDENT) / GIB, "activations_gib": held, "peak_gib": peaks,
        "host_gib": (max(ram) + RANK_RAM * num_gpus) / GIB, "checkpoint_gb": disk / 1e9,
    }  # fmt: skip


def table(plans) -> str:
    """One line per plan, then the commands; for a single plan also what its peak consists of."""
    names = list(plans[0]["peak_gib"])
    over = "".join(f"{word:^{11 * len(names)}}" for word in ("activations", "peak"))
    each = "".join(f"{name:>11}" for name in names * 2)
    lines = [f"{'':34}{over}  host RAM  checkpoint", f"method    GPUs micro-batch resident{each}       GiB          GB"]
    for p in plans:
        cells = "".join(f"{gib:11.2f}" for gib in (*p["activations_gib"].values(), *p["peak_gib"].values()))
        start = f"{p['method']:9}{p['num_gpus']:5}{p['micro_batch']:12}{p['resident_gib']:9.2f}"
        lines.append(f"{start}{cells}{p['host_gib']:10.0f}{p['checkpoint_gb']:12.1f}")
    lines += ["", *dict.fromkeys(f"{p['method']:9}{p['command']}" for p in plans)]
    if len(plans) == 1:
        lines += ["", *(f"{name:20}{gib:8.2f} GiB" for name, gib in plans[0]["items_gib"].items())]
    return "\n".join(lines)


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model_name_or_path", default="model", help="folder with config.json, or such a file (default: model)")
    add("--num_gpus", type=int, help="one rank each (default: 1, 4 and 8; 1 for the methods without ZeRO-3)")
    add("--method", choices=METHODS, help="only this one (default: all)")
    add("--train_parts", help=f"what trains: some of {','.join(NAMED)} (default: all; projector for ddp)")
    add("--micro_batch", type=int, help="pictures that a GPU holds at once (default: 1 and 4)")
    text = "what waits in host RAM; parameters only with ZeRO-3 (default: parameters, as train.sh has it)"
    add("--offload", choices=["none", "parameters", "activations", "both"], default="parameters", help=text)
    add("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    chosen = read_parts(args.train_parts) if args.train_parts else None
    beside = "lora" in (args.method or "")
    if chosen and ({"language", "attention"} & {*chosen} if beside else args.method == "ddp" and chosen == list(PARTS)):
        expected = "vision, projector or both" if beside else "fewer parts"
        raise UserError(f"--train_parts: found {args.train_parts} with --method {args.method}; expected {expected}")
    config = load_config(args.model_name_or_path)
    file = "zero3.json" if args.offload in ("parameters", "both") else "zero3_gpu.json"
    shapes, zero3 = parameters(config), read_json(ROOT / "scripts" / file)
    offload = args.offload in ("activations", "both")
    usual = {"full": list(PARTS), "ddp": ["projector"]}
    plans = [
        plan(config, shapes, zero3, method, gpus, micro, chosen or usual.get(method, []), offload)
        for method in (
            [args.method] if args.method else ("full", "ddp")[: 1 + (chosen != list(PARTS))] if chosen else METHODS
        )
        for gpus in ([args.num_gpus] if args.num_gpus else (1, 4, 8) if method in SHARDED else (1,))
        for micro in ([args.micro_batch] if args.micro_batch else (1, 4))
    ]
    seen, model = views(config), args.model_name_or_path
    if args.json:
        print(json.dumps({"model": model, "views": seen, "plans": plans}))
        return
    print(f"{model}: {plans[0]['parameters']:,} parameters. Computed, not measured. GiB per GPU; host RAM in all.")
    print("Image tokens per picture: " + ", ".join(f"{name} {tokens:,}" for name, (tokens, _) in seen.items()))
    print(f"\n{table(plans)}")


if __name__ == "__main__":
    run(main)
