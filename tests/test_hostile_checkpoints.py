"""Checkpoints from elsewhere: whatever is in the folder, one clear line, soon, and nothing in it runs."""

import contextlib
import functools
import json
import os
import pickle
import reprlib
import shutil
import signal
import tempfile
from pathlib import Path

import pytest

from animals.checkpoint.check import require_checkpoint
from animals.checkpoint.load import load_model
from animals.checkpoint.steps import check_resume, global_step, missing_files
from animals.checkpoint.task import settings_for
from animals.command import Findings, UserError
from animals.scoring.scorer import load_scorer
from animals.training.lora import LORA_TARGETS
from animals.training.preflight import check_checkpoint
from config import Config

WEIGHTS, ADAPTER = "model.safetensors", "adapter_config.json"
DEEP = "[" * 200_000
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
SLOW_REGEX = "(([a-z_.0-9]+)+)+!"
LONG_LABEL = {"cat": "x" * 100_000, "dog": "dog"}


# What can happen to a folder: each returns a function of the folder.
def raw(name, content):
    """In place of this file, this text or these bytes."""
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def put(name, key, value):
    """This value in a JSON file; the key may be a path such as text_config/hidden_size."""

    def change(folder):
        content = json.loads((folder / name).read_text())
        *path, last = key.split("/")
        functools.reduce(dict.get, path, content)[last] = value
        (folder / name).write_text(json.dumps(content))

    return change


def replaced(name, make):
    """In place of this file, what make(file) makes."""
    return lambda folder: ((folder / name).unlink(), make(folder / name))


def header(text, name=WEIGHTS):
    """This text as the header of the weights."""
    return raw(name, len(text).to_bytes(8, "little") + text.encode())


def index(weight_map):
    return raw("model.safetensors.index.json", json.dumps({"weight_map": weight_map}))


def itself(folder):
    """An adapter whose base is its own folder, which also looks like a checkpoint."""
    (folder / "config.json").write_text("{}")
    put(ADAPTER, "base_model_name_or_path", str(folder))(folder)


def sparse(file, size=100_000_000, start=b""):
    file.write_bytes(start)
    os.truncate(file, size)


def loop(file):
    file.symlink_to(file)


def cases(contents, values, others):
    """-> {name: (what happens to a folder, what is said)}: of a file its name, of a value the last part of its key."""
    found = {}
    for file, items in contents.items():
        for item in items:
            change = replaced(file, item) if callable(item) else raw(file, item)
            found[f"{file}: {getattr(item, '__name__', reprlib.repr(item))}"] = change, file
    for file, keys in values.items():
        for key, items in keys.items():
            for item in items:
                found[f"{file}: {key} {reprlib.repr(item)}"] = put(file, key, item), key.split("/")[-1]
    return found | {f"{message}: {i}": (change, message) for i, (change, message) in enumerate(others)}


CONTENTS = {  # file: contents, or what is made in its place
    "config.json": [
        "[1]", '"x"', "", DEEP, '{"model_type": ' + '{"a":' * 100_000, bytes(range(256)),
        '{"model_type": "llava_next"}'.encode("utf-16"), sparse, os.mkfifo, loop,
    ],
    "preprocessor_config.json": ["[]"], "processor_config.json": ["[]"], "model.safetensors.index.json": ["[]"],
    "tokenizer.json": [os.mkfifo, os.mkdir, sparse], "tokenizer_config.json": ["[]", os.mkfifo],
    "chat_template.json": ["[]", os.mkfifo], "task.json": ["[]", DEEP, os.mkfifo],
}  # fmt: skip
VALUES = {  # file: {key: values}
    "config.json": {
        "model_type": [["llava_next"]], "num_labels": [10**9],
        "text_config": [None, "mistral", []], "text_config/model_type": [{}], "text_config/num_labels": [10**9],
        "text_config/num_hidden_layers": [10**6, 0, True, "2", 2.5], "text_config/vocab_size": [10**12],
        "text_config/hidden_size": [10**15, -64, float("inf")], "text_config/num_attention_heads": [0],
        "text_config/rms_norm_eps": ["x"], "vision_config": [None, 3], "vision_config/num_hidden_layers": [10**6],
        "vision_config/hidden_size": [float("nan")], "vision_config/patch_size": [0, [14, 14]],
        "vision_config/image_size": [0, "336"], "vision_feature_layer": ["x", 99],
        "vision_feature_select_strategy": [3],
        "image_grid_pinpoints": [3, [], ["ab"], [[96, 96, 96]], [[0, 0]], [[10**9, 10**9]], [[96, 96]] * 10**6],
    },
    "preprocessor_config.json": {
        "size": [[96], "96"], "size/shortest_edge": [-96], "size/height": [10**6], "resample": ["x"],
        "image_grid_pinpoints": ["x", [[10**9, 1]]], "image_mean": ["x", [0.5]], "image_std": [[0, 0, 0]],
        "rescale_factor": ["x", float("inf")],
    },
    "processor_config.json": {"image_processor": [3], "patch_size": [0], "num_additional_image_tokens": ["x"]},
    "task.json": {
        "prompt": [["x"], None, "x" * 10_001, "{labels}" * 1250, "\ud800"], "answer": [3, "x"],
        "folder_to_label": [
            ["cat"], {}, "folders", {"cat": 1}, LONG_LABEL, {str(i): f"label {i}" for i in range(10_000)},
            *({"cat": label, "dog": "dog"} for label in ("", "a\nb", "\x1b[2J", "\ud800")),
        ],
        "chat_template": [
            [], "x" * 100_001, LOOP, "{% if 'dog' in messages|string %}" + LOOP + "{% endif %}",
            "{{ 'x' * 10**10 }}", "{{ messages[0].role * 10**10 }}", "{{ messages[0].role * 10**6 }}",
            "{% for", "{{ " + "(" * 40_000, "{{ ''.__class__.__mro__ }}",
        ],
    },
}  # fmt: skip
TENSOR = '{"a": {"dtype": "F32", "shape": %s, "data_offsets": %s}}'
ODD = ("[1]", '["0", "4"]'), ("[1]", "[]"), ('"xy"', "[0, 0]"), ("null", "[0, 0]")
HEADERS = ["[]", "3", '{"a": "b"}', DEEP, '{"a": {"dtype": "F32", "shape": [1]}}', *(TENSOR % values for values in ODD)]
INDEXES = [{"a": 1}, {"a": ["x"]}, ["a"], None, {}, {"a": "model\0.safetensors"}]
INDEXES += [{"lm_head.weight": "../model/model.safetensors"}, {"a": "/etc/passwd"}]  # out of the folder
OTHERS = [
    (replaced(WEIGHTS, os.mkfifo), "a pipe or a device"),
    (replaced(WEIGHTS, lambda file: file.symlink_to("/dev/zero")), "a pipe or a device"),
    (replaced(WEIGHTS, os.mkdir), "cannot be read: found a folder"),
    (replaced(WEIGHTS, loop), "cannot be read"),
    (raw(WEIGHTS, (2**63).to_bytes(8, "little") + b"{}"), "not safetensors"),
    (replaced(WEIGHTS, lambda file: sparse(file, 2**33, (2**32).to_bytes(8, "little"))), "not safetensors"),
    *((header(content), "not safetensors") for content in HEADERS),
    *((index(weight_map), "weight_map") for weight_map in INDEXES),
    (put("config.json", "text_config/hidden_act", "os.system"), "config.json"),
    (put("config.json", "text_config/rope_scaling", [1]), "config.json"),
    (put("preprocessor_config.json", "size", {"shortest_edge": 48}), "image_size"),
    *((raw("tokenizer.json", text), "cannot be read") for text in ("[]", "")),
]
HOSTILE = cases(CONTENTS, VALUES, OTHERS)

ADAPTER_VALUES = {
    "base_model_name_or_path": [None, ["x"]], "peft_type": ["IA3"], "target_modules": [SLOW_REGEX, "("],
    "modules_to_save": [[SLOW_REGEX]], "rank_pattern": [{SLOW_REGEX: 3}],
    "megatron_config": [{"x": 1}], "layer_replication": [[[0, 10**9]]],  # modules to import, layers to copy
}  # fmt: skip
ADAPTER_OTHERS = [
    (itself, "an adapter itself"),
    (put(ADAPTER, "r", 0), "r 0"),
    (put(ADAPTER, "r", 10**6), "r 1000000"),
    (put(ADAPTER, "r", 9_999), "r = 9999"),
    (header("[]", "adapter_model.safetensors"), "not safetensors"),
]
ADAPTERS = cases({ADAPTER: ["[]", os.mkfifo]}, {ADAPTER: ADAPTER_VALUES}, ADAPTER_OTHERS)


@pytest.fixture
def limit():
    """A test that takes 20 s fails, also one that waits for a pipe."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("not finished after 20 s"))
    signal.alarm(20)
    yield
    signal.alarm(0)


@pytest.fixture
def folder(demo, tmp_path):
    return Path(shutil.copytree(demo.checkpoint, tmp_path / "model", ignore=shutil.ignore_patterns("checkpoint-*")))


def name_with(folder):
    """As test.py."""
    require_checkpoint(folder)
    load_scorer(folder, settings_for(Config(), folder), "float32")


def train_with(folder):
    """As train.py until the weights load: it makes all checks, to report them together."""
    config, findings = settings_for(Config(), folder, training=True), Findings()
    findings.attempt(require_checkpoint, folder)
    findings.attempt(check_checkpoint, folder, config)
    findings.report()


def refusal(call, *values):
    with pytest.raises(UserError) as error:
        call(*values)
    assert max(map(len, str(error.value).splitlines())) < 1500
    return str(error.value)


@pytest.fixture(scope="module")
def lora(demo, tmp_path_factory):
    """A LoRA adapter to the demo's checkpoint."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("lora") / "adapter"
    model = get_peft_model(load_model(str(demo.checkpoint), "float32"), LoraConfig(target_modules=LORA_TARGETS))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_folder_is_refused(folder, limit, name):
    change, message = HOSTILE[name]
    change(folder)
    assert message in refusal(name_with, folder)
    assert message in refusal(train_with, folder)


@pytest.mark.parametrize("name", ADAPTERS)
def test_hostile_adapter_is_refused(lora, tmp_path, limit, name):
    folder, (change, message) = shutil.copytree(lora, tmp_path / "adapter"), ADAPTERS[name]
    change(folder)
    assert message in refusal(name_with, folder)


def test_nothing_in_the_folder_runs(folder, lora, tmp_path, limit, monkeypatch):
    """Python files that settings name, and pickles beside the weights and beside an adapter's."""
    monkeypatch.syspath_prepend(tmp_path)  # as the repository's root is, in which `model` lies

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    adapter = shutil.copytree(lora, tmp_path / "adapter")
    for place in (folder, adapter):
        (place / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
        for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt"):
            (place / name).write_bytes(pickle.dumps(Bomb()))
    classes = ("AutoConfig", "AutoModel", "AutoProcessor", "AutoTokenizer", "AutoImageProcessor")
    for name in ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json"):
        put(name, "auto_map", dict.fromkeys(classes, "evil.Evil"))(folder)
    put(ADAPTER, "auto_mapping", {"base_model_class": "Evil", "parent_library": "model.evil"})(adapter)
    name_with(folder)
    train_with(folder)
    name_with(adapter)
    put("tokenizer_config.json", "tokenizer_class", "Evil")(folder)
    put("processor_config.json", "processor_class", "Evil")(folder)
    with contextlib.suppress(UserError):
        name_with(folder)
    put(ADAPTER, "megatron_core", "adapter.evil")(adapter)
    put(ADAPTER, "megatron_config", {"tensor_model_parallel_size": 1})(adapter)
    assert "megatron_config" in refusal(name_with, adapter)
    assert not (tmp_path / "ran").exists()


REAL = ["config.json: text_config/num_hidden_layers 1000000", "config.json: mkfifo"]
REAL += [f"task.json: chat_template {reprlib.repr(LOOP)}", f"task.json: folder_to_label {reprlib.repr(LONG_LABEL)}"]


@pytest.mark.parametrize("name", REAL)
def test_the_real_command_says_it_in_one_line(demo, folder, run, tmp_path, name):
    change, message = HOSTILE[name]
    change(folder)
    flags = f"{demo.input}/test_data --model_name_or_path {folder} --output {tmp_path}/names.csv"
    done = run(f"python test.py {flags}", timeout=60, code=2)
    errors = [line for line in done.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0] and "Traceback" not in done.output, done.output


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user who may not read")
@pytest.mark.parametrize("name", ["config.json", "task.json", WEIGHTS])
def test_files_that_this_user_may_not_read(folder, limit, name):
    with tempfile.TemporaryDirectory() as place:  # tmp_path itself is closed to other users
        os.chmod(place, 0o755)
        model = Path(shutil.move(folder, place))
        (model / name).chmod(0o600)
        os.seteuid(65534)
        try:
            said = refusal(lambda: settings_for(Config(), model) and require_checkpoint(model))
        finally:
            os.seteuid(0)
    assert f"{model / name}: cannot be read: found Permission denied" in said


def test_records_of_wrong_types(tmp_path):
    for state in ({"global_step": "x"}, [], {}):
        raw("trainer_state.json", json.dumps(state))(tmp_path)
        assert "trainer_state.json" in refusal(global_step, tmp_path)
    for record, said in (([], "run.json"), ({"training": [], "model": 3}, "cannot be resumed")):
        raw("run.json", json.dumps(record))(tmp_path)
        assert said in refusal(check_resume, {"world_size": 1}, tmp_path)
    for files in ([], {"x": "1"}, {"x": []}, {"../x": -1}, {"x\0": 1}, "x", 3, None):
        raw("complete.json", json.dumps(files))(tmp_path)
        assert missing_files(tmp_path), f"{files}: an incomplete checkpoint"
