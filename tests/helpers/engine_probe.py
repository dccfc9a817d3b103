"""One rank of train.py itself, with AnimalTrainer and TRL's head, that writes down what its engine (or DDP) holds.

tests/test_memory_plan.py runs it under `accelerate launch`: engine_probe.py OUT.json [flags of train.py]. No model is
saved. "moved" has a dict per micro-step, with ZeRO-3: elements gathered, reduced, gathered on demand (not prefetched:
the rank waits), and the most that were alive at once, while the head was and otherwise, without the embedding.
"""

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks" / "meter")]
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator, iter_params
from moved import count_moved

import train
from animals.training import trainer as training

out_file = sys.argv.pop(1)
moved, now, history, vocabulary = count_moved(), {}, [], []
fetch = PartitionedParameterCoordinator.fetch_sub_module


def watched(self, module, *args, **kwargs):
    missing = [p.ds_numel for p in iter_params(module, recurse=False) if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]
    now["on_demand"] = now.get("on_demand", 0) + sum(missing)
    fetch(self, module, *args, **kwargs)
    live = self._PartitionedParameterCoordinator__n_available_params
    embedding, head = ((p.ds_status != ZeroParamStatus.NOT_AVAILABLE) * p.ds_numel for p in vocabulary)
    kind = "live_with_head" if head else "live"
    now[kind] = max(now.get(kind, 0), live - embedding)


PartitionedParameterCoordinator.fetch_sub_module = watched


def size_of(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


class Probe(training.AnimalTrainer):
    def __init__(self, *, model, **kwargs):
        vocabulary.extend((model.get_input_embeddings().weight, model.get_output_embeddings().weight))
        super().__init__(model=model, **kwargs)

    def training_step(self, *args, **kwargs):
        now.clear()
        moved.update(all_gather=0, reduce_scatter=0)
        loss = super().training_step(*args, **kwargs)
        self.gradients = [p.grad for p in self.model.parameters() if p.grad is not None]  # of DDP
        history.append(dict.fromkeys(("on_demand", "live", "live_with_head"), 0) | moved | now)
        return loss

    def save_final(self):
        mine, optimizer, master = list(self.model.parameters()), self.optimizer.optimizer, []
        numel = sum(p.numel() for p in mine)
        if self.is_deepspeed_enabled:
            zero = self.deepspeed.optimizer
            optimizer, master = zero.optimizer, zero.fp32_partitioned_groups_flat
            numel, mine = sum(p.ds_numel for p in mine), [p.ds_tensor for p in mine]
            self.gradients = [zero.grad_partitions_flat_buffer]
        states = [item for state in optimizer.state.values() for item in state.items()]
        held = {
            "parameters": size_of(mine),
            "gradients": size_of(self.gradients),
            "fp32 master": size_of(master),
            "8-bit states": size_of(v for name, v in states if torch.is_tensor(v) and "qmap" not in name),
            "moved": history,
            "numel": numel,
            "ranks": self.args.world_size,
            "sub_groups": [t.numel() for t in master],
        }
        if self.args.process_index == 0:
            Path(out_file).write_text(json.dumps(held))


training.AnimalTrainer = Probe
if __name__ == "__main__":
    os.chdir(ROOT)
    train.main()
