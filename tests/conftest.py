"""Shared: the repository root as working directory, running commands, and the demo, run once for all tests."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from animals.ranks import choose_arithmetic

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of torch in the tests themselves: two of them run at once
ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser):
    parser.addoption(
        "--kills", type=int, default=2, help="how often test_survive.py kills a run (tests/helpers/soak.sh: 10)"
    )
    parser.addoption("--reuse-demo", action="store_true", help="use temp/demo as it is instead of running demo/run.sh")


if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in a job in the background: children would ignore it, too
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def start(command, **environment):
    """Start a command in the root under sh (POSIX); stdout and stderr in one pipe, this python on the PATH."""
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    env |= {key: str(value) for key, value in environment.items()}
    env["VIRTUAL_ENV"], env["PATH"] = sys.prefix, f"{sys.prefix}/bin:{env['PATH']}"
    words = ["sh", "-c", f"exec {command}"]
    return subprocess.Popen(words, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def sh(command, timeout=3600, code=None, **environment):
    """start(), and wait: .code and .output. With `code`, another exit code fails the test, which shows the output."""
    process = start(command, **environment)
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert code in (None, process.returncode), output[-3000:]
    return SimpleNamespace(code=process.returncode, output=output)


@pytest.fixture(scope="session")
def run():
    return sh


@pytest.fixture(scope="session")
def arithmetic():
    """The type that a run on the CPU computes in although it asks for bfloat16."""
    return choose_arithmetic(True, "bfloat16")[1]


DEMO = ROOT / "temp" / "demo"


def pytest_sessionstart(session):
    """Run the demo once, before the tests are shared out over processes."""
    worker = hasattr(session.config, "workerinput")
    if not worker and not session.config.getoption("--reuse-demo") and not session.config.option.collectonly:
        done = sh("sh demo/run.sh")
        if done.code:
            pytest.exit(f"sh demo/run.sh ended with {done.code}:\n{done.output[-5000:]}", returncode=1)


@pytest.fixture(scope="session")
def demo():
    """temp/demo after `sh demo/run.sh`: .root, .model (before training), .input, .checkpoint, .cache."""
    return SimpleNamespace(
        root=DEMO,
        model=DEMO / "model",
        input=DEMO / "input",
        checkpoint=DEMO / "sft-llava-demo",
        cache=DEMO / "cache",
    )


@pytest.fixture(scope="session")
def others_pictures(tmp_path_factory):
    """A tree that somebody else made: PNGs and JPEGs with transparency, palettes, greyscale and odd shapes."""
    import numpy
    from PIL import Image

    root = tmp_path_factory.mktemp("others")
    random = numpy.random.default_rng(0)
    modes = [("RGBA", "png"), ("P", "png"), ("L", "jpg"), ("LA", "png"), ("RGB", "JPEG"), ("1", "png"), ("CMYK", "jpg")]
    sizes = [(40, 300), (300, 40), (97, 61), (64, 64), (200, 150), (31, 33), (640, 480)]
    for split, count in (("train_data", 9), ("validation_data", 7)):
        for folder in ("cat", "dog", "ragno"):
            (root / split / folder).mkdir(parents=True)
            for i in range(count):
                (mode, kind), size = modes[i % len(modes)], sizes[(i + len(folder)) % len(sizes)]
                pixels = random.integers(0, 256, (size[1], size[0], 4), dtype=numpy.uint8)
                Image.fromarray(pixels, "RGBA").convert("RGB" if mode in ("CMYK", "P", "1") else "RGBA").convert(
                    mode if mode != "RGB" else "RGB"
                ).save(root / split / folder / f"Bild {i}.{kind}")
    return root


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A narrow replica of the hub repository's folder, of this file of tests alone."""
    import replica

    return replica.build(tmp_path_factory.mktemp("hub") / "model")


@pytest.fixture(scope="module")
def data(others_pictures, tmp_path_factory):
    """The flags of train.sh that name others_pictures, and folders for what is made of them."""
    tmp = tmp_path_factory.mktemp("cache")
    return (
        f"--input_dir {others_pictures} --temp_dir {tmp}/cache --logging_dir {tmp}/logs --allow_leaks --max_excluded 1"
    )


@pytest.fixture
def tree(tmp_path):
    """A small tree of pictures of this test alone, as the Config of who reads it."""
    from tests.helpers.pictures import make_tree

    return make_tree(tmp_path)
