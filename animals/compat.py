"""Private names of other libraries, used here alone. Each function says why; tests/test_compat.py what breaks."""

import contextlib


@contextlib.contextmanager
def whole_models():
    """A model that is built in here is whole, not partitioned, even if ZeRO-3 is on; transformers has no switch."""
    from transformers.integrations import deepspeed

    kept, deepspeed._hf_deepspeed_config_weak_ref = deepspeed._hf_deepspeed_config_weak_ref, None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = kept
