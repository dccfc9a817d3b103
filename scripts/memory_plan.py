"""How much memory, host RAM, disk and traffic a training run takes, computed from config.json before any weight loads.

    python scripts/memory_plan.py                        # model/config.json, 4 GPUs of 24 GiB, 64 pictures a step
    python scripts/memory_plan.py --num_gpus 8 --effective_batch 128 --json
    python scripts/memory_plan.py --num_gpus 1 --use_peft --load_in_4bit
    python scripts/memory_plan.py --num_gpus 1 --train_parts projector --ddp

Computed, not measured: no GPU was at hand. The formulas, and what they are held against, are in
animals/training/memory.py. GiB are 2**30 bytes, GB are 10**9.

--json prints {"model", "tokens": {"median", "largest", "source"}, "gpu_memory_gib", "limit_gib", "plans": [plan, ...],
"recommended": plan or null, "reason"}. A plan is what plan() in animals/training/memory.py returns.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from animals.command import UserError, run
from animals.training.memory import (
    MARGIN,
    all_counts,
    load_config,
    load_zero3,
    method_of,
    recommend,
    rows,
    table,
    token_counts,
)
from animals.training.parts import PARTS, read_parts
from config import parser


def main():
    flags = parser(__doc__.split("\n")[0])
    add = flags.add_argument
    add("--model_name_or_path", default="model", help="folder with config.json, or that file; weights are not needed")
    add("--num_gpus", type=int, default=4, help="GPUs, one rank each")
    add("--gpu_memory_gib", type=float, default=24, help=f"memory of one GPU; plans leave {MARGIN:g} GiB of it free")
    add("--effective_batch", type=int, default=64, help="pictures a step: micro-batch x accumulation x GPUs")
    add("--deepspeed_config", default="scripts/zero3.json", help="the DeepSpeed settings to judge")
    add("--use_peft", action="store_true", help="LoRA: only adapters have gradients, master weights and states")
    add("--load_in_4bit", action="store_true", help="with --use_peft: QLoRA, an NF4 base on every GPU, without ZeRO-3")
    add(
        "--ddp",
        action="store_true",
        help="the whole model on every GPU (scripts/ddp.yaml), for --use_peft or --train_parts projector",
    )
    add("--lora_r", type=int, default=16, help="rank of the adapters")
    add(
        "--train_sampling_strategy", default="batch_rebalance", choices=["random", "batch_rebalance"], help="train.py's"
    )
    add("--json", action="store_true", help="print one JSON object")
    args = flags.parse_args()
    if args.load_in_4bit and not args.use_peft:
        raise UserError("--load_in_4bit: found it alone; expected --use_peft too, 4-bit weights do not train")
    parts = read_parts(args.train_parts)
    if args.ddp and not args.use_peft and parts == list(PARTS):
        raise UserError("--ddp: found all weights to train; expected --use_peft or less, like --train_parts projector")
    method = method_of(not args.ddp, args.use_peft, args.load_in_4bit)
    zero3, config = load_zero3(args.deepspeed_config), load_config(args.model_name_or_path, args.image_view or "tiles")
    tokens, limit = token_counts(config, args.temp_dir), args.gpu_memory_gib - MARGIN
    sizes = (tokens["median"], tokens["largest"])
    balanced = args.train_sampling_strategy == "batch_rebalance" and (Path(args.temp_dir) / "train.json").exists()
    counts = all_counts(config, args.temp_dir) if balanced else None
    plans = rows(config, zero3, args.num_gpus, args.effective_batch, sizes, method, args.lora_r, counts, parts)
    best, reason = recommend(plans, limit)
    if args.json:
        report = {"model": args.model_name_or_path, "tokens": tokens, "gpu_memory_gib": args.gpu_memory_gib}
        print(json.dumps(report | {"limit_gib": limit, "plans": plans, "recommended": best, "reason": reason}))
        return
    p = plans[0]
    print(f"{p['parameters']:,} parameters, {p['trained']:,} trained ({method})")
    print(f"image tokens: {tokens['median']:,} median, {tokens['largest']:,} largest; {tokens['source']}")
    print(f"GiB on each of {args.num_gpus} GPUs; computed, not measured; with activation checkpointing\n")
    print(table(plans, limit))
    print("peak = parameters + gradients + master + states + buckets + reserve + the largest of (live layers +")
    print("       activations, live layers + LM-head backward + what the forward saved, optimizer step)")
    disk = p["disk_gb"]
    once, final, both = disk["checkpoint"], disk["final"], disk["total"]
    print(f"disk: {disk['kept']} x {once:.1f} GB checkpoint + {final:.1f} GB final = {both:.0f} GB")
    print(f"\nrecommended: {reason}")


if __name__ == "__main__":
    run(main)
