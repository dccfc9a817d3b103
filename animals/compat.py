"""Private names of other libraries, nowhere else: each function says why it is needed, and a test what breaks."""

import atexit
import contextlib


@contextlib.contextmanager
def whole_models():
    """A model that is built in here is whole, not partitioned, even if ZeRO-3 is on.

    Checks and the memory plan look at shapes; transformers builds the vision tower within zero.Init, which empties
    them (tests/test_checkpoint.py), and has no switch.
    """
    from transformers.integrations import deepspeed

    kept, deepspeed._hf_deepspeed_config_weak_ref = deepspeed._hf_deepspeed_config_weak_ref, None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = kept


def save_as_loaded(model):
    """Have save_pretrained write the parameter names that from_pretrained read.

    Under ZeRO-3 transformers keeps every renaming rule for the way back, a legacy one included that loading did not
    use: it would save language_model.model.model.*, which only transformers itself reads (tests/test_checkpoint.py).
    """
    model._weight_conversions = [rule for rule in model._weight_conversions if rule.was_used()]


def never_compile_shared_memory_op():
    """Keep DeepSpeed from building its shared-memory op for CPU ranks, which only inference uses.

    It takes half a minute, and a rank killed meanwhile leaves a lock file at which every later start would wait for
    ever (tests/test_machines.py leaves one). No setting turns it off.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def run_exit_functions():
    """What the interpreter runs at exit, for a rank that ends by os._exit(): other libraries write and clean up there.

    tests/test_preflight.py registers one.
    """
    atexit._run_exitfuncs()


@contextlib.contextmanager
def ignoring(model_class, name):
    """from_pretrained() neither lists nor warns of `name` in the files, where the model has no such parameter.

    from_pretrained() has no argument for it; without this each load of the whole view prints a report of
    image_newline, as if something were wrong.
    """
    kept = model_class._keys_to_ignore_on_load_unexpected
    model_class._keys_to_ignore_on_load_unexpected = [name]
    try:
        yield
    finally:
        model_class._keys_to_ignore_on_load_unexpected = kept


def load_as_resumed(trainer, folder):
    """Load a checkpoint into a Trainer that stands, as train(resume_from_checkpoint=folder) does. All ranks.

    Trainer does it only at the start of train(), which would build the engine once more (tests/test_rehearsal.py).
    """
    from transformers.integrations.deepspeed import deepspeed_load_checkpoint

    if trainer.is_deepspeed_enabled:
        whole = not hasattr(trainer.model, "peft_config")  # an adapter's checkpoint lacks the base
        deepspeed_load_checkpoint(trainer.model_wrapped, folder, load_module_strict=whole)
    else:
        trainer._load_from_checkpoint(folder)
    trainer._load_optimizer_and_scheduler(folder)
