"""The only place for private names of other libraries. Each function says why it is needed and which test shows it."""

import atexit
import contextlib


@contextlib.contextmanager
def unpartitioned_models():
    """A model that is built in this context has all its shapes, even if ZeRO-3 is on. For checks that build on meta.

    transformers builds the vision tower within zero.Init, which empties its shapes (tests/test_checkpoint.py), and has
    no switch for it.
    """
    from transformers.integrations import deepspeed

    kept, deepspeed._hf_deepspeed_config_weak_ref = deepspeed._hf_deepspeed_config_weak_ref, None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = kept


def save_as_loaded(model):
    """Make save_pretrained write the parameter names that from_pretrained read.

    Under ZeRO-3 transformers applies every renaming rule backwards, also an old one that loading did not use: it would
    save language_model.model.model.*, which only transformers itself can read (tests/test_checkpoint.py).
    """
    model._weight_conversions = [rule for rule in model._weight_conversions if rule.was_used()]


def never_compile_shared_memory_op():
    """Keep DeepSpeed from building its shared-memory operator for CPU ranks, which only inference uses. No switch.

    The build takes half a minute. If the rank is killed meanwhile, a lock file stays, and every later start waits for
    it without end (tests/test_machines.py leaves one).
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def run_exit_functions():
    """Run what libraries registered for the exit; for a rank that ends by os._exit() (tests/test_preflight.py)."""
    atexit._run_exitfuncs()


def load_as_resumed(trainer, folder):
    """Load a checkpoint into an existing Trainer, as train(resume_from_checkpoint=folder) does. All ranks.

    Trainer does it only at the start of train(), which would build the engine once more (tests/test_rehearsal.py).
    """
    from transformers.integrations.deepspeed import deepspeed_load_checkpoint

    if trainer.is_deepspeed_enabled:
        strict = not hasattr(trainer.model, "peft_config")  # an adapter's checkpoint lacks the base
        deepspeed_load_checkpoint(trainer.model_wrapped, folder, load_module_strict=strict)
    else:
        trainer._load_from_checkpoint(folder)
    trainer._load_optimizer_and_scheduler(folder)
