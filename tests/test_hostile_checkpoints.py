"""Checkpoints from elsewhere: whatever is in the folder, one clear line, soon, and nothing in it runs."""

import contextlib
import json
import os
import pickle
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

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
DEEP = "[" * 200_000
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
SLOW_REGEX = "(([a-z_.0-9]+)+)+!"


def raw(name, content):
    """In place of this file, this text or these bytes."""
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def put(name, key, value):
    """This value in a JSON file; the key may be a path such as text_config/hidden_size."""

    def change(folder):
        content = json.loads((folder / name).read_text())
        *path, last = key.split("/")
        part = content
        for step in path:
            part = part[step]
        part[last] = value
        (folder / name).write_text(json.dumps(content))

    return change


def config(key, value):
    return put("config.json", key, value)


def task(key, value):
    return put("task.json", key, value)


def pixels(key, value):
    return put("preprocessor_config.json", key, value)


def adapter(key, value):
    return put("adapter_config.json", key, value)


def header(content):
    """These bytes, or this JSON, as the header of the weights."""
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    return raw(WEIGHTS, len(content).to_bytes(8, "little") + content)


def index(weight_map):
    return raw(INDEX, json.dumps({"weight_map": weight_map}))


def outside(folder):
    """The weights beside the folder instead of in it."""
    shutil.move(folder / WEIGHTS, folder.parent / "elsewhere.safetensors")
    names = header_of(folder.parent / "elsewhere.safetensors")
    index(dict.fromkeys(names, "../elsewhere.safetensors"))(folder)


def header_of(file):
    content = file.read_bytes()
    found = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return found.keys() - {"__metadata__"}


def pipe(name):
    def change(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


def link(name, target):
    def change(folder):
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return change


def as_folder(name):
    def change(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


def long_file(name):
    def change(folder):
        os.truncate(folder / name, 100_000_000)

    return change


def itself(folder):
    """An adapter whose base is its own folder, which also looks like a checkpoint."""
    (folder / "config.json").write_text("{}")
    adapter("base_model_name_or_path", str(folder))(folder)


FULL_LABELS = {str(i): f"label {i}" for i in range(10_000)}
HOSTILE = {
    # weights
    "header is a list": (header([]), "not safetensors"),
    "header is a number": (header(3), "not safetensors"),
    "header without data_offsets": (header({"a": {"dtype": "F32", "shape": [1]}}), "not safetensors"),
    "header of strings": (header({"a": "b"}), "not safetensors"),
    "offsets are strings": (header({"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}}), "not safetens"),
    "offsets are empty": (header({"a": {"dtype": "F32", "shape": [1], "data_offsets": []}}), "not safetensors"),
    "shape is a string": (header({"a": {"dtype": "F32", "shape": "xy", "data_offsets": [0, 0]}}), "not safetensors"),
    "shape is null": (header({"a": {"dtype": "F32", "shape": None, "data_offsets": [0, 0]}}), "not safetensors"),
    "header is deep": (header(DEEP.encode()), "not safetensors"),
    "header is of no end": (raw(WEIGHTS, (2**63).to_bytes(8, "little") + b"{}"), "not safetensors"),
    "header is 4 GB": (lambda f: (header(b"{}")(f), raw(WEIGHTS, (2**32).to_bytes(8, "little"))(f),
                                  os.truncate(f / WEIGHTS, 2**33)), "not safetensors"),
    "weights are a pipe": (pipe(WEIGHTS), "a pipe or a device"),
    "weights are a folder": (as_folder(WEIGHTS), "cannot be read: found a folder"),
    "weights link to themselves": (link(WEIGHTS, WEIGHTS), "cannot be read"),
    "weights link to a device": (link(WEIGHTS, "/dev/zero"), "a pipe or a device"),
    # the list of shards
    "index to a number": (index({"a": 1}), "weight_map"),
    "index to a list": (index({"a": ["x"]}), "weight_map"),
    "index is a list": (raw(INDEX, "[]"), "index.json"),
    "index has a list": (index(["a"]), "weight_map"),
    "index has none": (raw(INDEX, "{}"), "weight_map"),
    "index is empty": (index({}), "weight_map"),
    "index out of the folder": (outside, "weight_map"),
    "index absolute": (index({"a": "/etc/passwd"}), "weight_map"),
    "index with a zero": (index({"a": "model\0.safetensors"}), "weight_map"),
    # config.json
    "config is a list": (raw("config.json", "[1]"), "config.json"),
    "config is a string": (raw("config.json", '"x"'), "config.json"),
    "config is empty": (raw("config.json", ""), "config.json"),
    "config is deep": (raw("config.json", DEEP), "config.json"),
    "config is deep in a dict": (raw("config.json", '{"model_type": ' + '{"a":' * 100_000), "config.json"),
    "config is UTF-16": (raw("config.json", '{"model_type": "llava_next"}'.encode("utf-16")), "config.json"),
    "config is binary": (raw("config.json", bytes(range(256))), "config.json"),
    "config is 100 MB": (long_file("config.json"), "config.json"),
    "config is a pipe": (pipe("config.json"), "config.json"),
    "config links to itself": (link("config.json", "config.json"), "config.json"),
    "model_type is a list": (config("model_type", ["llava_next"]), "model_type"),
    "text_config is null": (config("text_config", None), "text_config"),
    "text_config is a string": (config("text_config", "mistral"), "text_config"),
    "text_config is a list": (config("text_config", []), "text_config"),
    "text model_type is a dict": (config("text_config/model_type", {}), "model_type"),
    "vision_config is null": (config("vision_config", None), "vision_config"),
    "vision_config is a number": (config("vision_config", 3), "vision_config"),
    "a million layers": (config("text_config/num_hidden_layers", 10**6), "num_hidden_layers"),
    "a million vision layers": (config("vision_config/num_hidden_layers", 10**6), "num_hidden_layers"),
    "no layer": (config("text_config/num_hidden_layers", 0), "num_hidden_layers"),
    "layers are true": (config("text_config/num_hidden_layers", True), "num_hidden_layers"),
    "layers are a string": (config("text_config/num_hidden_layers", "2"), "num_hidden_layers"),
    "layers are a float": (config("text_config/num_hidden_layers", 2.5), "num_hidden_layers"),
    "wide": (config("text_config/hidden_size", 10**15), "hidden_size"),
    "negative": (config("text_config/hidden_size", -64), "hidden_size"),
    "infinite": (config("text_config/hidden_size", float("inf")), "hidden_size"),
    "not a number": (config("vision_config/hidden_size", float("nan")), "hidden_size"),
    "many words": (config("text_config/vocab_size", 10**12), "vocab_size"),
    "many classes": (config("num_labels", 10**9), "num_labels"),
    "many classes of text": (config("text_config/num_labels", 10**9), "num_labels"),
    "patch of 0": (config("vision_config/patch_size", 0), "patch_size"),
    "patch is a list": (config("vision_config/patch_size", [14, 14]), "patch_size"),
    "image of 0": (config("vision_config/image_size", 0), "image_size"),
    "image is a string": (config("vision_config/image_size", "336"), "image_size"),
    "heads of 0": (config("text_config/num_attention_heads", 0), "num_attention_heads"),
    "no eps": (config("text_config/rms_norm_eps", "x"), "config.json"),
    "an activation": (config("text_config/hidden_act", "os.system"), "config.json"),
    "a rope": (config("text_config/rope_scaling", [1]), "config.json"),
    "a layer of pictures": (config("vision_feature_layer", "x"), "vision_feature_layer"),
    "a layer that is not there": (config("vision_feature_layer", 99), "vision_feature_layer"),
    "a strategy": (config("vision_feature_select_strategy", 3), "vision_feature_select_strategy"),
    "pinpoints are a number": (config("image_grid_pinpoints", 3), "image_grid_pinpoints"),
    "pinpoints are empty": (config("image_grid_pinpoints", []), "image_grid_pinpoints"),
    "pinpoints are strings": (config("image_grid_pinpoints", ["ab"]), "image_grid_pinpoints"),
    "pinpoints of three": (config("image_grid_pinpoints", [[96, 96, 96]]), "image_grid_pinpoints"),
    "pinpoints of 0": (config("image_grid_pinpoints", [[0, 0]]), "image_grid_pinpoints"),
    "huge pinpoints": (config("image_grid_pinpoints", [[10**9, 10**9]]), "image_grid_pinpoints"),
    "a million pinpoints": (config("image_grid_pinpoints", [[96, 96]] * 10**6), "image_grid_pinpoints"),
    # preprocessor and tokenizer
    "pixels are a list": (raw("preprocessor_config.json", "[]"), "preprocessor_config.json"),
    "size is a list": (pixels("size", [96]), "size"),
    "size is a string": (pixels("size", "96"), "size"),
    "size is negative": (pixels("size", {"shortest_edge": -96}), "shortest_edge"),
    "size is large": (pixels("size", {"height": 10**6, "width": 10**6}), "height"),
    "size is another": (pixels("size", {"shortest_edge": 48}), "image_size"),
    "pixels' pinpoints": (pixels("image_grid_pinpoints", "x"), "image_grid_pinpoints"),
    "pixels' huge pinpoints": (pixels("image_grid_pinpoints", [[10**9, 1]]), "image_grid_pinpoints"),
    "mean is a string": (pixels("image_mean", "x"), "image_mean"),
    "mean of one": (pixels("image_mean", [0.5]), "image_mean"),
    "std of 0": (pixels("image_std", [0, 0, 0]), "image_std"),
    "resample is a word": (pixels("resample", "x"), "resample"),
    "rescale is a word": (pixels("rescale_factor", "x"), "rescale_factor"),
    "rescale is infinite": (pixels("rescale_factor", float("inf")), "rescale_factor"),
    "processor is a list": (raw("processor_config.json", "[]"), "processor_config.json"),
    "processor's pixels are a number": (put("processor_config.json", "image_processor", 3), "image_processor"),
    "processor's patch of 0": (put("processor_config.json", "patch_size", 0), "patch_size"),
    "processor's extra tokens": (put("processor_config.json", "num_additional_image_tokens", "x"), "num_additional"),
    "tokenizer is a list": (raw("tokenizer.json", "[]"), "cannot be read"),
    "tokenizer is empty": (raw("tokenizer.json", ""), "cannot be read"),
    "tokenizer is a pipe": (pipe("tokenizer.json"), "tokenizer.json"),
    "tokenizer is a folder": (as_folder("tokenizer.json"), "tokenizer.json"),
    "tokenizer is 100 MB": (long_file("tokenizer.json"), "tokenizer.json"),
    "tokenizer's settings are a list": (raw("tokenizer_config.json", "[]"), "tokenizer_config.json"),
    "tokenizer's settings are a pipe": (pipe("tokenizer_config.json"), "tokenizer_config.json"),
    "a template is a pipe": (pipe("chat_template.json"), "chat_template.json"),
    "a template is a list": (raw("chat_template.json", "[]"), "chat_template.json"),
    # task.json
    "task is a list": (raw("task.json", "[]"), "task.json"),
    "task is deep": (raw("task.json", DEEP), "task.json"),
    "task is a pipe": (lambda f: (pipe("task.json")(f)), "task.json"),
    "prompt is a list": (task("prompt", ["x"]), "prompt"),
    "prompt is null": (task("prompt", None), "prompt"),
    "prompt is long": (task("prompt", "x" * 10_001), "prompt"),
    "prompt is a bomb": (task("prompt", "{labels}" * 1250), "prompt"),
    "prompt is half a letter": (task("prompt", "\ud800"), "prompt"),
    "answer is a number": (task("answer", 3), "answer"),
    "answer without label": (task("answer", "x"), "answer"),
    "table is a list": (task("folder_to_label", ["cat"]), "folder_to_label"),
    "table is empty": (task("folder_to_label", {}), "folder_to_label"),
    "table is a string": (task("folder_to_label", "folders"), "folder_to_label"),
    "label is a number": (task("folder_to_label", {"cat": 1}), "folder_to_label"),
    "label is empty": (task("folder_to_label", {"cat": "", "dog": "dog"}), "folder_to_label"),
    "label of 100 kB": (task("folder_to_label", {"cat": "x" * 100_000, "dog": "dog"}), "folder_to_label"),
    "label of two lines": (task("folder_to_label", {"cat": "a\nb", "dog": "dog"}), "folder_to_label"),
    "label with an escape": (task("folder_to_label", {"cat": "\x1b[2J", "dog": "dog"}), "folder_to_label"),
    "label is half a letter": (task("folder_to_label", {"cat": "\ud800", "dog": "dog"}), "folder_to_label"),
    "10,000 labels": (task("folder_to_label", FULL_LABELS), "folder_to_label"),
    "template is a list": (task("chat_template", []), "chat_template"),
    "template is long": (task("chat_template", "x" * 100_001), "chat_template"),
    "template loops": (task("chat_template", LOOP), "chat_template"),
    "template loops for one label": (task("chat_template", "{% if 'dog' in messages|string %}" + LOOP + "{% endif %}"),
                                     "chat_template"),
    "template is a bomb": (task("chat_template", "{{ 'x' * 10**10 }}"), "chat_template"),
    "template is a bomb at run-time": (task("chat_template", "{{ messages[0].role * 10**10 }}"), "chat_template"),
    "template's text is long": (task("chat_template", "{{ messages[0].role * 10**6 }}"), "chat_template"),
    "template is not jinja": (task("chat_template", "{% for"), "chat_template"),
    "template is deep": (task("chat_template", "{{ " + "(" * 40_000), "chat_template"),
    "template leaves the sandbox": (task("chat_template", "{{ ''.__class__.__mro__ }}"), "chat_template"),
}  # fmt: skip


ADAPTERS = {
    "settings are a list": (raw("adapter_config.json", "[]"), "adapter_config.json"),
    "settings are a pipe": (pipe("adapter_config.json"), "adapter_config.json"),
    "base is null": (adapter("base_model_name_or_path", None), "base_model_name_or_path"),
    "base is a list": (adapter("base_model_name_or_path", ["x"]), "base_model_name_or_path"),
    "base is itself": (itself, "an adapter itself"),
    "rank of 0": (adapter("r", 0), "r 0"),
    "rank of a million": (adapter("r", 10**6), "r 1000000"),
    "rank of another": (adapter("r", 9_999), "r = 9999"),
    "no LoRA": (adapter("peft_type", "IA3"), "peft_type"),
    "slow pattern": (adapter("target_modules", SLOW_REGEX), "target_modules"),
    "no pattern": (adapter("target_modules", "("), "target_modules"),
    "names that are patterns": (adapter("modules_to_save", [SLOW_REGEX]), "modules_to_save"),
    "a module to import": (adapter("megatron_config", {"x": 1}), "megatron_config"),
    "layers to copy": (adapter("layer_replication", [[0, 10**9]]), "layer_replication"),
    "patterns of ranks": (adapter("rank_pattern", {SLOW_REGEX: 3}), "rank_pattern"),
    "header is a list": (
        lambda f: (header([])(f), os.replace(f / WEIGHTS, f / "adapter_model.safetensors")),
        "not saf",
    ),
}


@pytest.fixture
def limit():
    """A test that takes 20 s fails, also one that waits for a pipe."""

    def end(number, frame):
        raise AssertionError("not finished after 20 s")

    signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, 20)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)


@pytest.fixture
def folder(demo, tmp_path):
    return Path(shutil.copytree(demo.checkpoint, tmp_path / "model", ignore=shutil.ignore_patterns("checkpoint-*")))


def test_with(folder):
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
    lines = str(error.value).splitlines()
    assert all(len(line) < 1500 for line in lines), max(map(len, lines))
    return str(error.value)


test_with.__test__ = False


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_folder_is_refused(folder, limit, name):
    change, message = HOSTILE[name]
    change(folder)
    assert message in refusal(test_with, folder)
    assert message in refusal(train_with, folder)


@pytest.fixture(scope="module")
def lora(demo, tmp_path_factory):
    """A LoRA adapter to the demo's checkpoint."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("lora") / "adapter"
    model = get_peft_model(load_model(str(demo.checkpoint), "float32"), LoraConfig(target_modules=LORA_TARGETS))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ADAPTERS)
def test_hostile_adapter_is_refused(lora, tmp_path, limit, name):
    folder, (change, message) = shutil.copytree(lora, tmp_path / "adapter"), ADAPTERS[name]
    change(folder)
    assert message in refusal(test_with, folder)


def test_nothing_in_the_folder_runs(folder, lora, tmp_path, limit, monkeypatch):
    """Python files that settings name, and pickles beside the weights and beside an adapter's."""
    monkeypatch.syspath_prepend(tmp_path)  # as the repository's root is, in which `model` lies

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    shutil.copytree(lora, tmp_path / "adapter")
    for place in (folder, tmp_path / "adapter"):
        (place / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
        for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt"):
            (place / name).write_bytes(pickle.dumps(Bomb()))
    classes = ("AutoConfig", "AutoModel", "AutoProcessor", "AutoTokenizer", "AutoImageProcessor")
    for name in ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json"):
        put(name, "auto_map", dict.fromkeys(classes, "evil.Evil"))(folder)
    adapter("auto_mapping", {"base_model_class": "Evil", "parent_library": "model.evil"})(tmp_path / "adapter")
    test_with(folder)
    train_with(folder)
    test_with(tmp_path / "adapter")
    put("tokenizer_config.json", "tokenizer_class", "Evil")(folder)
    put("processor_config.json", "processor_class", "Evil")(folder)
    with contextlib.suppress(UserError):
        test_with(folder)
    adapter("megatron_core", "adapter.evil")(tmp_path / "adapter")
    adapter("megatron_config", {"tensor_model_parallel_size": 1})(tmp_path / "adapter")
    assert "megatron_config" in refusal(test_with, tmp_path / "adapter")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["a million layers", "config is a pipe", "template loops", "label of 100 kB"])
def test_the_real_command_says_it_in_one_line(demo, folder, run, tmp_path, name):
    change, message = HOSTILE[name]
    change(folder)
    done = run(
        f"python test.py {demo.input}/test_data --model_name_or_path {folder} --output {tmp_path}/names.csv", timeout=60
    )
    errors = [line for line in done.output.splitlines() if line.startswith("error: ")]
    assert done.code == 2 and len(errors) == 1 and message in errors[0] and "Traceback" not in done.output, done.output


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user who may not read")
@pytest.mark.parametrize("name", ["config.json", "task.json", "model.safetensors"])
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


@pytest.mark.parametrize("label", ["", "x" * 101, "a\nb", "\x1b[2J", "\u202e", "\ud800"])
def test_labels_on_the_command_line_are_held_to_the_same(label):
    with pytest.raises(UserError, match="--folder_to_label: found .* 1 to 100 printable characters"):
        Config(folder_to_label=json.dumps({"cat": label, "dog": "dog"}))
    Config(folder_to_label={"kerm": "کرم\u200cابریشم", "dog": "x" * 100})


RECORDS = {  # what a run left, of wrong types
    "step is a string": ("trainer_state.json", {"global_step": "x"}),
    "state is a list": ("trainer_state.json", []),
    "step is missing": ("trainer_state.json", {}),
    "run is a list": ("run.json", []),
    "run's part is a list": ("run.json", {"training": [], "model": 3}),
}


@pytest.mark.parametrize("name", RECORDS)
def test_records_of_wrong_types(folder, limit, name):
    file, content = RECORDS[name]
    (folder / file).write_text(json.dumps(content))
    if file == "run.json":
        assert "cannot be resumed" in refusal(check_resume, {"world_size": 1}, folder) or content == []
    else:
        assert file in refusal(global_step, folder)


@pytest.mark.parametrize("content", [[], {"x": "1"}, {"x": []}, {"../x": -1}, {"x\0": 1}, "x", 3, None])
def test_a_list_of_files_of_wrong_types_is_an_incomplete_checkpoint(tmp_path, content):
    (tmp_path / "complete.json").write_text(json.dumps(content))
    assert missing_files(tmp_path)


def test_the_folder_itself_is_sound(folder, limit):
    test_with(folder)
    train_with(folder)
