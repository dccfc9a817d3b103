"""One rank of train.py itself, with AnimalTrainer and TRL's head, that writes down what its engine (or DDP) holds.

Run by tests/test_memory_plan.py under `accelerate launch`: engine_probe.py OUT.json [flags of train.py]. Nothing is
saved. "moved", of ZeRO-3: a dict for each micro-step: elements gathered and reduced, gathered on demand (not
prefetched: waited for), and alive at most: while the head is gathered, for the loss, and at all other times. The
embedding is left out, which is gathered before there are activations.
"""

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks" / "meter")]
import torch  # noqa: E402
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus  # noqa: E402
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator, iter_params  # noqa: E402
from moved import count_moved  # noqa: E402

import train  # noqa: E402
from animals.training import trainer as training  # noqa: E402

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
        vocabulary.extend(part.weight for part in (model.get_input_embeddings(), model.get_output_embeddings()))
        super().__init__(model=model, **kwargs)

    def training_step(self, *args, **kwargs):
        now.clear()
        moved.update(all_gather=0, reduce_scatter=0)
        loss = super().training_step(*args, **kwargs)
        self.gradients = [p.grad for p in self.model.parameters() if p.grad is not None]  # DDP's
        counted = "on_demand", "live", "live_with_head"
        history.append({**moved, **{name: now.get(name, 0) for name in counted}})
        return loss

    def save_final(self):
        parameters = list(self.model.parameters())
        if self.is_deepspeed_enabled:
            zero = self.deepspeed.optimizer
            optimizer, master = zero.optimizer, zero.fp32_partitioned_groups_flat
            numel, mine = sum(p.ds_numel for p in parameters), [p.ds_tensor for p in parameters]
            self.gradients = [zero.grad_partitions_flat_buffer]
        else:
            optimizer, master = self.optimizer.optimizer, []
            numel, mine = sum(p.numel() for p in parameters), parameters
        states = [item for state in optimizer.state.values() for item in state.items()]
        states = [value for name, value in states if torch.is_tensor(value) and "qmap" not in name]
        held = {
            "parameters": size_of(mine),
            "gradients": size_of(self.gradients),
            "master": size_of(master),
            "states": size_of(states),
            "moved": history,
            "numel": numel,
            "ranks": self.args.world_size,
            "sub_groups": [t.numel() for t in master],
            "losses": [log["loss"] for log in self.state.log_history if "loss" in log],
        }
        if self.args.process_index == 0:
            Path(out_file).write_text(json.dumps(held))


training.AnimalTrainer = Probe
if __name__ == "__main__":
    os.chdir(ROOT)
    train.main()
