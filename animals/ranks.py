"""Who speaks and who waits: one rank talks for all, and all wait for each other. Imports torch only to wait."""

import os
import sys


def main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def barrier():
    """All ranks."""
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def say(message):
    """On rank 0's stderr."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)
