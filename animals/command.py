"""How every command starts and ends: a user's mistake is one line and exit code 2. Standard library only."""

import argparse
import logging
import os
import sys
import time
import warnings


class UserError(Exception):
    """A mistake that the user can correct: what was found, what was expected, what to do. Exit code 2, no traceback."""


class Findings(list):
    """The messages of failed checks, collected so that all of them are reported together."""

    def attempt(self, check, *values):
        """check(*values); if it raises a UserError, its message is kept and None comes back."""
        try:
            return check(*values)
        except UserError as error:
            self.append(str(error))

    def report(self):
        if self:
            raise UserError("\n".join(self))


# What `pip install -r requirements.txt` brings, by the names that are imported.
PACKAGES = "torch transformers trl accelerate deepspeed bitsandbytes datasets PIL tensorboard tokenizers numpy peft "
PACKAGES += "sklearn matplotlib sentencepiece google jinja2 scipy imagehash cleanlab joblib werkzeug filelock psutil "
PACKAGES += "safetensors huggingface_hub yaml tqdm packaging"


def python_problem(version=sys.version_info) -> str:
    """A line if there is no release for this Python of what requirements.txt pins, else an empty text."""
    found = f"found Python {version[0]}.{version[1]} ({sys.executable}); expected 3.11 to 3.14, as the packages of "
    how = "requirements.txt need; make an environment: python3.11 -m venv .venv, and install them into it"
    return "" if (3, 11) <= version < (3, 15) else found + how


def missing_package(error: ModuleNotFoundError) -> str:
    """A line if the module that was not found comes with requirements.txt, else an empty text."""
    name = str(error.name).split(".")[0]
    found = f"found no Python package {name}; expected it; pip install -r requirements.txt"
    return found if name in PACKAGES.split() and error.name == name else ""


def explain(kind, error, trace):
    """In place of a traceback a line and exit code 2, if the environment is not what requirements.txt asks for."""
    line = python_problem() or (missing_package(error) if isinstance(error, ModuleNotFoundError) else "")
    if not line:
        return sys.__excepthook__(kind, error, trace)
    print(f"error: {line}", file=sys.stderr, flush=True)
    sys.exit(2)


sys.excepthook = explain  # from here on, because modules import packages before run() is called


def run(main):
    """Call main(). A UserError is printed on stderr, one line per problem, and ends the process with exit code 2.

    Before that it sets defaults: libraries keep their caches in temp/cache; nothing is downloaded; progress bars are
    for terminals only; torch's compiler, which bitsandbytes would import at every start, is off unless asked for.
    """
    cache = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "temp", "cache")
    for name in ("TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "HF_DATASETS_CACHE", "MPLCONFIGDIR"):
        os.environ.setdefault(name, os.path.join(cache, name.split("_")[0].lower()))
    for flag, name in (("--push_to_hub", "HF_HUB_OFFLINE"), ("--torch_compile", "TORCHDYNAMO_DISABLE")):
        if not any(word.replace("-", "_").startswith(flag.replace("-", "_")) for word in sys.argv):
            os.environ.setdefault(name, "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    # torch and bitsandbytes warn of what no user can change.
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")  # for the data workers
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        if problem := python_problem():
            raise UserError(problem)
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank:  # rank 0 nearly always has the same error: let it print first and the launcher end this rank
            time.sleep(3)
        for line in str(error).splitlines():
            print(f"{f'rank {rank}: ' if rank else ''}error: {line}", file=sys.stderr, flush=True)
        sys.exit(2)


def yes_or_no(text: str) -> bool:
    """The type of a flag that takes True or False."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"found {text!r}; expected True or False")
    return text.lower() == "true"
