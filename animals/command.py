"""How every command starts and ends: its flags and their ranges; a user's mistake is one line and exit code 2.

Standard library only.
"""

import argparse
import logging
import os
import re
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
    """In place of a traceback a line and exit code 2, if a package of requirements.txt is not there."""
    line = isinstance(error, ModuleNotFoundError) and missing_package(error)
    if not line:
        return sys.__excepthook__(kind, error, trace)
    print(f"error: {line}", file=sys.stderr, flush=True)
    sys.exit(2)


# Here, because modules import packages, and what Python lacks before 3.11, before run() is called.
sys.excepthook = explain
if problem := python_problem():
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(2)


def run(main):
    """Call main(). A UserError is printed on stderr, one line per problem, and ends the process with exit code 2.

    Before that it sets defaults: libraries keep their caches in temp/cache; nothing is downloaded; progress bars are
    for terminals only; torch's compiler, which bitsandbytes would import at every start, is off unless asked for.
    """
    cache = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "temp", "cache")
    for name in ("TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "HF_DATASETS_CACHE", "MPLCONFIGDIR"):
        os.environ.setdefault(name, os.path.join(cache, name.split("_")[0].lower()))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if not any(word.startswith("--torch_compile") for word in with_underscores(sys.argv)):
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    # torch and bitsandbytes warn of what no user can change.
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")  # for the data workers
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
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


# The numbers on a command line: lowest and highest value, of the flags' type. All other flags' must be finite.
RANGES = {
    name: (low, high)
    for low, high, names in [
        # ours
        (0, 10**9, "eval_pictures near_duplicate_limit"),
        (0, 1024, "data_processes"),
        (0, 65535, "port"),
        (0, 16, "near_duplicate_distance"),
        (1, 4096, "num_gpus micro_batch"),
        (0.0, 1.0, "max_excluded min_probability min_labels_mass"),
        (0.001, 0.999, "validation_fraction"),
        (1, 1000, "early_stopping_patience"),
        (0.0001, 10_000.0, "max_hours"),
        # transformers' and TRL's
        (0, 2**32 - 1, "seed data_seed"),
        (0, 10**6, "save_total_limit"),  # 0: all are kept
        (0, 256, "dataloader_num_workers"),
        (1, 10**9, "max_steps torch_empty_cache_steps"),  # max_steps also -1: as many as --num_train_epochs gives
        (1, 10**7, "ddp_timeout"),  # seconds
        (1, 10**6, "examples_per_class gradient_accumulation_steps ddp_bucket_cap_mb lora_r lora_alpha"),
        (1, 4096, "per_device_train_batch_size per_device_eval_batch_size dataloader_prefetch_factor"),
        (1e-6, 1e4, "num_train_epochs"),
        (1e-6, 1e9, "logging_steps eval_steps save_steps"),  # below 1: a share of all steps, as in warmup_steps
        (1e-12, 10.0, "learning_rate vision_learning_rate projector_learning_rate"),
        (1e-20, 1.0, "adam_epsilon"),
        (0.0, 0.999999, "adam_beta1 adam_beta2"),
        (0.0, 0.999, "lora_dropout"),
        (0.0, 1.0, "warmup_ratio"),
        (0.0, 10.0, "weight_decay"),
        (0.0, 1e3, "neftune_noise_alpha"),
        (0.0, 1e9, "warmup_steps eval_delay max_grad_norm"),  # max_grad_norm 0: gradients are not clipped
    ]
    for name in names.split()
}

# In a file's or folder's name these would act on a terminal or break a line; or they are no UTF-8 (half letters).
UNPRINTABLE = re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
PLACES = ("_dir", "_path", "output")  # flags that end so name files or folders


def range_problems(values: dict) -> list[str]:
    """A line for each number in {flag: value} outside its range or not finite, each empty text, unprintable name."""
    problems = []
    for name, value in values.items():
        if type(value) in (int, float):
            low, high = RANGES.get(name, (-sys.float_info.max, sys.float_info.max))
            expected = f"a number from {low:g} to {high:g}" if name in RANGES else "a finite number"
            if not low <= value <= high and (name, value) != ("max_steps", -1):
                problems.append(f"--{name}: found {value}; expected {expected}")
        elif value in ("", [""]) and name != "prompt":
            problems.append(f"--{name}: found an empty text; expected a value; name one, or leave the flag away")
        elif name.endswith(PLACES) and isinstance(value, str) and UNPRINTABLE.search(value):
            expected = "a name in UTF-8 without control characters; rename it"
            problems.append(f"--{name}: found {ascii(value)}; expected {expected}")
    return problems


def with_underscores(words) -> list[str]:
    """The words of a command line, with `--max-steps` as `--max_steps`; what follows a bare `--` stays as it is."""
    end = words.index("--") if "--" in words else len(words)
    return [re.sub("^--[^=]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), w) for w in words[:end]] + words[end:]


class Parser(argparse.ArgumentParser):
    """Accepts no shortened flag. A mistake is a UserError, also a number outside its RANGES and an empty text."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(self, args=None, namespace=None):
        values, unknown = super().parse_known_args(with_underscores(sys.argv[1:] if args is None else args), namespace)
        if problems := range_problems(vars(values)):
            raise UserError("\n".join(problems))
        if files := [word for word in unknown if word[:1] == "-" and os.path.lexists(word)]:
            raise UserError(f"{files[0]}: found the name of a file where a flag was expected; write ./{files[0]}")
        return values, unknown

    def error(self, message):
        raise UserError(f"{message}; --help lists every flag")
