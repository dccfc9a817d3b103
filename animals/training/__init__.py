"""What train.py needs beside its recipe: trainer, batches, parts, LoRA, the checks before a start, the rehearsal.

Nothing in here is needed to score a checkpoint; validation.py and test.py import none of it.
"""
