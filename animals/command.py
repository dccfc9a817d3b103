"""One line a mistake and exit code 2: how every command of this project starts and ends. Standard library only."""

import argparse
import logging
import os
import sys
import time
import warnings


class UserError(Exception):
    """Something the user can mend: what was found, what was expected, what to do. Exit code 2, no traceback."""


def run(main):
    """Call main(); a UserError becomes its message on stderr, a line a problem, and exit code 2.

    Before that: every cache that torch, DeepSpeed and friends would put under ~ goes to temp/cache, nobody is called
    (models are local folders), progress bars are for terminals only, and torch's compiler, which bitsandbytes would
    import at every start, stays away unless asked for.
    """
    cache = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "temp", "cache")
    for name in ("TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "HF_DATASETS_CACHE", "MPLCONFIGDIR"):
        os.environ.setdefault(name, os.path.join(cache, name.split("_")[0].lower()))
    if not any(word.startswith("--push_to_hub") for word in sys.argv):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if not any(word.startswith("--torch_compile") for word in sys.argv):
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    # torch warns on every ZeRO-3 collective and checkpointed layer, bitsandbytes of a CPU kernel for 4 bit: none of it
    # is the user's to mend. The environment variable carries the filter into dataloader workers.
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank:  # rank 0 nearly always says the same: give it time to, and the launcher to end this one
            time.sleep(3)
        for line in str(error).splitlines():
            print(f"{f'rank {rank}: ' if rank else ''}error: {line}", file=sys.stderr, flush=True)
        sys.exit(2)


class Findings(list):
    """The messages of several failed checks, so that all of them are reported together."""

    def attempt(self, check, *values):
        """check(*values); if it raises a UserError, its message is kept and None comes back."""
        try:
            return check(*values)
        except UserError as error:
            self.append(str(error))

    def report(self):
        """Raise one UserError with all messages, if there are any."""
        if self:
            raise UserError("\n".join(self))


def yes_or_no(text: str) -> bool:
    """What bool() gets wrong: "False" is False."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"found {text!r}; expected True or False")
    return text.lower() == "true"
