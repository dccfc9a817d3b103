"""While its folder is on PYTHONPATH, python measures any run of transformers' Trainer, whatever the script.

Each rank writes <output_dir>.meter.<rank>.json: when each step ended (seconds since 1970), the CPU seconds and the
elements gathered and reduced by then, the seconds that each step waited for data, its tokens and how many of them are
padding, and the peak memory of the process (MiB). TRL computes logits at the answer's positions alone, as on a GPU;
without Triton it would take all positions.
"""

import importlib.abc
import importlib.util
import json
import os
import sys
import time


class Hook(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "transformers.trainer":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def then_measure(module):
            run(module)
            measure(module.Trainer)

        spec.loader.exec_module = then_measure
        return spec


def measure(trainer):
    import resource

    import trl.trainer.utils

    trl.trainer.utils._use_triton = lambda device: True

    seen = {"steps": [], "cpu": [], "moved": [], "waits": [], "tokens": [], "padding": []}
    fetch, train = trainer.get_batch_samples, trainer.train

    def get_batch_samples(self, *args, **kwargs):
        now = time.time()
        batches, items = fetch(self, *args, **kwargs)
        seen["waits"].append(time.time() - now)
        masks = [batch["attention_mask"] for batch in batches]
        seen["tokens"].append(sum(mask.numel() for mask in masks))
        seen["padding"].append(sum(int((mask == 0).sum()) for mask in masks))
        return batches, items

    def train_and_note(self, *args, **kwargs):
        from moved import count_moved
        from transformers import TrainerCallback

        moved = count_moved()

        class Clock(TrainerCallback):
            def on_step_end(self, *args, **kwargs):
                seen["steps"].append(time.time())
                seen["cpu"].append(time.process_time())
                seen["moved"].append(dict(moved))

        self.add_callback(Clock())
        result = train(self, *args, **kwargs)
        seen["mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        with open(f"{self.args.output_dir}.meter.{os.environ['RANK']}.json", "w") as file:
            json.dump(seen, file)
        return result

    trainer.get_batch_samples, trainer.train = get_batch_samples, train_and_note


sys.meta_path.insert(0, Hook())
