"""One rank of train.py that prints before each micro-step how many states the optimizer has, and how many tokens come.

tests/test_rehearsal.py runs it under `accelerate launch`: states_probe.py [flags of train.py].
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import train
from animals.training.trainer import AnimalTrainer

plain_step = AnimalTrainer.training_step


def watched_step(self, model, inputs, *args):
    states = self.optimizer.optimizer.state  # DeepSpeed's or accelerate's wrapper around bitsandbytes
    size = inputs["input_ids"].numel()
    print(f"probe: rank {self.args.process_index} step {self.state.global_step} {len(states)} states {size} tokens")
    return plain_step(self, model, inputs, *args)


AnimalTrainer.training_step = watched_step
if __name__ == "__main__":
    os.chdir(ROOT)
    train.main()
