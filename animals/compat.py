"""Private names of other libraries, nowhere else: each function says why it is needed, and a test what breaks."""

import atexit


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
