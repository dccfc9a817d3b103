"""What train.py needs beside its recipe: trainer, batches, LoRA, the memory plan, what is checked and said before.

Nothing here is needed to score a checkpoint, but for preflight's checks of files and pictures.
"""
