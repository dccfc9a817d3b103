"""One rank of a tiny LLaVA-NeXT under a real ZeRO-3 engine with bitsandbytes' 8-bit AdamW; counts what it holds.

Run by tests/test_memory_plan.py under `accelerate launch`: engine_probe.py CONFIG.json OUT.json
"""

import json
import sys
from pathlib import Path

import deepspeed.ops
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks" / "meter"))
from moved import count_moved  # noqa: E402

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as train.py does
config_file, out_file = sys.argv[1:3]
config = LlavaNextConfig(**json.loads(Path(config_file).read_text()))
arguments = TrainingArguments(  # before the model: zero.Init partitions while it is built
    output_dir=out_file + ".dir",
    use_cpu=True,
    bf16=True,
    max_steps=4,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    optim="adamw_bnb_8bit",
    activation_checkpointing=True,
    report_to="none",
    save_strategy="no",
    disable_tqdm=True,
    logging_steps=1,
)
model = LlavaNextForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
size, tiles = config.vision_config.image_size, 3  # a 1x2 picture: base tile + two
side = size // config.vision_config.patch_size
tokens = side * side + side * (2 * side + 1)
ids = [1] + [config.image_token_id] * tokens + [5, 6, 2]
one = {
    "input_ids": torch.tensor(ids),
    "labels": torch.tensor([-100] * (len(ids) - 2) + [6, 2]),
    "attention_mask": torch.ones(len(ids), dtype=torch.long),
    "pixel_values": torch.randn(tiles, 3, size, size),
    "image_sizes": torch.tensor([size, 2 * size]),
}
moved = count_moved()
fetch, live = PartitionedParameterCoordinator.fetch_sub_module, [0]
vocabulary = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]


def watched(self, *args, **kwargs):
    fetch(self, *args, **kwargs)
    now = self._PartitionedParameterCoordinator__n_available_params
    now -= sum(p.ds_numel for p in vocabulary if p.ds_status != ZeroParamStatus.NOT_AVAILABLE)
    live[0] = max(live[0], now)


PartitionedParameterCoordinator.fetch_sub_module = watched
history = []


class Probe(Trainer):
    def training_step(self, *args, **kwargs):
        moved.update(all_gather=0, reduce_scatter=0)
        live[0] = 0
        result = super().training_step(*args, **kwargs)
        history.append({**moved, "live": live[0]})
        return result


trainer = Probe(model=model, args=arguments, train_dataset=[one] * 64)
trainer.train()
zero = trainer.deepspeed.optimizer


def size_of(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


state = [t for s in zero.optimizer.state.values() for k, t in s.items() if torch.is_tensor(t) and "qmap" not in k]
held = {
    "parameters": size_of(p.ds_tensor for p in trainer.deepspeed.module.parameters()),
    "gradients": size_of([zero.grad_partitions_flat_buffer]),
    "master": size_of(zero.fp32_partitioned_groups_flat),
    "states": size_of(state),
    "moved_per_micro_step": history,
    "numel": sum(p.ds_numel for p in trainer.deepspeed.module.parameters()),
    "ranks": arguments.world_size,
    "sub_groups": [t.numel() for t in zero.fp32_partitioned_groups_flat],
    "bucket": size_of(b.buffer for b in zero.ipg_buckets.values()),
    "loss": [x["loss"] for x in trainer.state.log_history if "loss" in x],
}
if arguments.process_index == 0:
    Path(out_file).write_text(json.dumps(held))
