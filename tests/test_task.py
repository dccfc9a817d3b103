"""A checkpoint says what it was trained on: labels, question, answer and template travel with it, and win."""

import csv
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from animals.checkpoint.task import changed_task_flags, read_task, settings_for, task_of, write_task
from animals.command import UserError
from animals.files import read_json
from animals.pictures.read import load_picture
from animals.scoring.report import read_report
from animals.scoring.scorer import load_scorer
from config import ANSWER, CHAT_TEMPLATE, FOLDER_TO_LABEL, PROMPT, Config
from scripts.whole_view import write_whole_view

TABLE = {"cat": "kitty", "ragno": "spider"}
TASK = {"folder_to_label": TABLE, "prompt": "Who? {labels}", "answer": "A {label}.", "chat_template": "its own"}


@pytest.fixture
def tuned(tmp_path):
    """A folder with a task.json and no weights."""
    write_task(tmp_path, TASK)
    return tmp_path


def test_config_py_then_the_checkpoint_then_flags(tuned, tmp_path):
    defaults = {"folder_to_label": FOLDER_TO_LABEL, "prompt": PROMPT, "answer": ANSWER, "chat_template": CHAT_TEMPLATE}
    assert task_of(settings_for(Config(), "no/such/folder")) == defaults
    assert task_of(settings_for(Config(), tuned)) == TASK
    same = settings_for(Config(prompt="Who? {labels}", max_excluded=0.5), tuned)
    assert task_of(same) == TASK and same.max_excluded == 0.5
    assert task_of(settings_for(same, tuned)) == TASK, "asked twice is asked once"
    new = settings_for(Config(prompt="Now?"), tuned, training=True)
    assert task_of(new) == TASK | {"prompt": "Now?"}
    line = f'--prompt: found "Now?"; expected "Who? {{labels}}", with which {tuned} was trained'
    assert changed_task_flags(new, tuned) == [line]
    assert changed_task_flags(Config(prompt="Now?"), "no/such/folder") == changed_task_flags(Config(), tuned) == []


@pytest.mark.parametrize(
    ("flags", "found", "trained"),
    [
        ({"prompt": "other"}, '"other"', '"Who? {labels}"'),
        ({"answer": "{label}"}, '"{label}"', '"A {label}."'),
        ({"folder_to_label": '{"cat": "cat"}'}, '{"cat": "cat"}', '{"cat": "kitty", "ragno": "spider"}'),
        ({"folder_to_label": '{"ragno": "kitty", "cat": "spider"}'}, '{"ragno": "kitty", "cat": "spider"}', '{"cat": '),
        ({"folder_to_label": '{"ragno": "spider", "cat": "kitty"}'}, '{"ragno": "spider", "cat": "kitty"}', '{"cat": '),
    ],
)
def test_scoring_with_another_task_is_refused_with_both(tuned, flags, found, trained):
    with pytest.raises(UserError) as error:
        settings_for(Config(**flags), tuned)
    (name,), (line,) = flags, str(error.value).splitlines()
    assert line.startswith(f"--{name}: found {found}; expected {trained}") and str(tuned) in line
    assert line.endswith("; leave out the flag")


def test_pictures_in_folders_of_other_names_are_no_contradiction(tuned):
    table = {"gatto": "kitty", "cat": "kitty", "spin": "spider"}
    config = settings_for(Config(folder_to_label=table), tuned)
    assert config.folder_to_label == table and config.labels == ["kitty", "spider"] and config.prompt == TASK["prompt"]


def test_where_it_is_looked_for(tmp_path):
    """An adapter's own before its base's; a folder of checkpoint-N has that of the newest, a model's folder none."""
    base, adapter, run = tmp_path / "base", tmp_path / "adapter", tmp_path / "run"
    for folder in (base, adapter, run / "checkpoint-9", run / "checkpoint-10"):
        folder.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    assert read_task(adapter) is None
    write_task(base, TASK | {"image_view": "tiles"})  # as older versions wrote it
    assert read_task(adapter) == TASK
    write_task(adapter, TASK | {"answer": "{label}"})
    assert read_task(adapter)["answer"] == "{label}"
    write_task(run / "checkpoint-9", TASK)
    write_task(run / "checkpoint-10", TASK | {"prompt": "newest"})
    assert read_task(run)["prompt"] == "newest"
    (run / "config.json").write_text("{}")
    assert read_task(run) is None


def test_an_older_adapter_to_the_whole_view_needs_its_base(tmp_path):
    base, adapter = tmp_path / "model", tmp_path / "sft"
    base.mkdir()
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    write_task(adapter, TASK | {"image_view": "whole"})
    (base / "config.json").write_text('{"model_type": "llava"}')
    assert task_of(settings_for(Config(), adapter)) == TASK
    (base / "config.json").write_text('{"model_type": "llava_next"}')
    with pytest.raises(UserError, match=r"'whole', .*; expected .*'llava'; .* scripts/whole_view.py \S+ OUT") as error:
        settings_for(Config(), adapter)
    assert str(error.value).endswith(f"base_model_name_or_path of {adapter}/adapter_config.json")
    assert "\n" not in str(error.value)


def test_a_task_json_of_something_else_is_a_line_each(tuned):
    (tuned / "task.json").write_text('{"prompt": "Who?"}')
    with pytest.raises(UserError) as error:
        settings_for(Config(), tuned)
    for line, name in zip(str(error.value).splitlines(), ["folder_to_label", "answer", "chat_template"], strict=True):
        assert re.search(f"task.json: {name}: found None; expected .*; copy it from the run again", line)


def test_folders_are_labels(tmp_path):
    names = [f"kind_{i:03} of thing" for i in range(120)]
    for name in ["." + names[0], *reversed(names)]:
        (tmp_path / "validation_data" / name).mkdir(parents=True)
    (tmp_path / "validation_data" / "notes.txt").touch()
    config = Config(input_dir=str(tmp_path), folder_to_label="folders")
    assert config.labels == names and list(config.folder_to_label) == names
    (tmp_path / "train_data" / "dog").mkdir(parents=True)
    assert Config(input_dir=str(tmp_path), folder_to_label="folders").labels == ["dog"]
    with pytest.raises(UserError, match="--folder_to_label folders: found no folder in gone/train_data or gone/valid"):
        Config(input_dir="gone", folder_to_label="folders")


LABELS = ["", "x" * 101, "a\nb", "\x1b[2J", "\u202e", "\ud800", "image", "unsure"]
TABLES = ["folder", "[1]", "{}", '{"cat": 1}', *(json.dumps({"cat": label, "dog": "dog"}) for label in LABELS)]


@pytest.mark.parametrize("table", TABLES)
def test_what_is_no_table_is_one_line(table):
    message = '--folder_to_label: found .*; expected JSON like {"ragno": "spider"}, .* 1 to 100 printable characters'
    with pytest.raises(UserError, match=message):
        Config(folder_to_label=table)
    Config(folder_to_label={"kerm": "کرم\u200cابریشم", "dog": "x" * 100})


SYLLABLES = [a + b for a in "abcdefghij" for b in "klmnopqrstuv"]
CASES = {  # folder -> label, pictures per folder in each split, held-out ones that are scored (0: all), prompt, answer
    "table": ({"cat": "kitty", "dog": "dog", "ragno": "spider"}, (16, 12), 0, "Which one? {labels}.", "{label}"),
    "120 folders": (dict(zip(SYLLABLES, SYLLABLES, strict=True)), (2, 1), 0, "What is this?", "{label}"),
    "invented names": (
        {"Quax": "Quax", "blib blab": "blib blab", "red_zorx": "red_zorx"},
        (6, 4), 9, "Zorx or what? {labels}", "It is {label}.",
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=[pytest.param(n, marks=[pytest.mark.slow] * n.startswith("120")) for n in CASES])
def trained(request, demo, run, tmp_path_factory):
    """Two steps: three of the demo's folders with other labels; 120 folders; another wording, in the whole view."""
    tmp, real = tmp_path_factory.mktemp("task"), request.param == "table"
    table, counts, scored, prompt, answer = CASES[request.param]
    for split, count in zip(("train_data", "validation_data"), counts, strict=True):
        for k, name in enumerate(table):
            folder = tmp / "input" / split / name
            folder.mkdir(parents=True)
            for path in sorted((demo.input / split / name).iterdir())[:count] if real else ():
                shutil.copy(path, folder)
            for i in range(0 if real else count):
                noise = Image.effect_noise((40 + k % 3 * 20, 40), 60 + k + 7 * count + i)
                noise.convert("RGB").save(folder / f"{i}.png")
    flag, model = (json.dumps(table), demo.checkpoint) if real else ("folders", demo.model)
    if request.param == "invented names":
        model = tmp / "model"
        write_whole_view(demo.model, model)
    data = f"--input_dir {tmp}/input --temp_dir {tmp}/cache --logging_dir {tmp}/logs"
    done = run(
        f"sh train.sh {data} --folder_to_label '{flag}' --prompt '{prompt}' --answer '{answer}' --max_steps 2 "
        f"--save_steps 2 --eval_steps 2 --eval_on_start False --eval_pictures {scored} --learning_rate 1e-3 "
        "--vision_learning_rate 1e-3 "
        f"--gradient_accumulation_steps 1 --model_name_or_path {model} --output_dir {tmp}/sft"
    )
    assert done.code == 0, done.output[-3000:]
    on = f"--on_eval_pictures --eval_pictures {scored}" if scored else ""
    labels = list(table.values())
    return SimpleNamespace(out=tmp / "sft", data=data, input=tmp / "input", labels=labels, prompt=prompt, on=on)


invented = pytest.mark.parametrize("trained", ["invented names"], indirect=True)


@invented
def test_every_saved_folder_says_what_it_was_trained_on(trained, run):
    table = {label: label for label in trained.labels}
    task = {"folder_to_label": table, "prompt": "Zorx or what? {labels}", "answer": "It is {label}."}
    for folder in (trained.out, trained.out / "checkpoint-2"):
        assert read_json(folder / "task.json") == task | {"chat_template": CHAT_TEMPLATE}
        config = read_json(folder / "config.json")
        assert config["id2label"] == dict(zip("012", trained.labels, strict=True))
        assert config["label2id"] == {label: i for i, label in enumerate(trained.labels)}
        assert "<s>" not in read_json(folder / "chat_template.json")["chat_template"], "the hub's"
    rows = read_json(trained.input.parent / "cache" / "train.json", kind=list)
    assert rows[0]["messages"] == Config(**task).conversation("Quax")
    for command in ("sh validation.sh", "python validation.py", "python test.py"):
        done = run(f"{command} --prompt other --model_name_or_path {trained.out}")
        assert done.code == 2 and done.output.count("\n") == 1, done.output
        assert 'error: --prompt: found "other"; expected "Zorx or what? {labels}"' in done.output


def test_no_flag_is_needed_to_score_what_was_trained(trained, run, tmp_path):
    """Plain validation.sh and test.py: the trained labels, and the accuracy of the training's last evaluation."""
    flags = f"{trained.data} --model_name_or_path {trained.out}"
    done = run(f"sh validation.sh {flags} {trained.on} --report_dir {tmp_path}")
    assert done.code == 0, done.output[-3000:]
    report, scored = read_report(str(tmp_path / "sft"))
    history = read_json(trained.out / "checkpoint-2" / "trainer_state.json")["log_history"]
    [last], n = [log for log in history if "eval_accuracy" in log], len(trained.labels)
    assert last["eval_pictures"] == report["n"] == (9 if trained.on else 36 if n == 3 else 120)
    assert (report["accuracy"], report["macro_f1"]) == (last["eval_accuracy"], last["eval_macro_f1"])
    assert n > 3 or trained.on or report["accuracy"] > 0.4, "not one answer to everything"
    assert sorted(report["labels"]) == sorted(trained.labels)
    assert report["question"] == trained.prompt.replace("{labels}", ", ".join(report["labels"]))
    some = scored[:: len(scored) // 3][:3]
    pictures = " ".join(f"'{row['image']}'" for row in some)
    done = run(f"python test.py {pictures} --model_name_or_path {trained.out} --output {tmp_path}/n.csv")
    assert done.code == 0, done.output[-3000:]
    with open(tmp_path / "n.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 and list(rows[0])[-n:] == report["labels"]
    for row, before in zip(rows, some, strict=True):
        for label in report["labels"]:
            assert float(row[label]) == pytest.approx(before[label], abs=0.02)  # a GPU: bf16


def test_the_trained_scorer_equals_teacher_forcing(trained):
    """log p of the answer's tokens and </s>, one label at a time, in float32."""
    config = settings_for(Config(), str(trained.out))
    scorer, model = load_scorer(str(trained.out), config, "float32")
    assert sorted(scorer.labels) == sorted(trained.labels)
    picture = load_picture(next(trained.input.glob("validation_data/*/*")))
    ours = scorer.score(model, scorer.collate([picture]))[0]

    def encode(label=None):
        chat = config.conversation(label)
        text = scorer.processor.apply_chat_template(chat, chat_template=config.chat_template, tokenize=False)
        return scorer.processor(images=picture, text=text, add_special_tokens=False, return_tensors="pt")

    prompt = encode()["input_ids"].shape[1]
    for label, score in zip(scorer.labels, ours.tolist(), strict=True):
        inputs = encode(label)
        with torch.inference_mode():
            log_p = model(**inputs).logits.float().log_softmax(-1)[0]
        ids = inputs["input_ids"][0].tolist()
        alone = sum(log_p[i - 1, ids[i]].item() for i in range(prompt, len(ids)))
        assert abs(alone - score) < 1e-4, (label, alone, score)


@invented
def test_training_on_top_with_another_answer_is_said_and_recorded(trained, run, tmp_path):
    done = run(
        f"sh train.sh {trained.data} --model_name_or_path {trained.out} --output_dir {tmp_path}/sft "
        "--answer '{label}' --max_steps 1 --save_strategy no --eval_strategy no --gradient_accumulation_steps 1"
    )
    assert done.code == 0, done.output[-3000:]
    assert done.output.count('--answer: found "{label}"; expected "It is {label}."') == 1
    assert read_task(tmp_path / "sft") == read_task(trained.out) | {"answer": "{label}"}


@invented
def test_the_card_shows_how_to_ask_and_that_works(trained, demo):
    """Its ten lines, in a process that imports nothing of ours, on a model that learned something."""
    card = (trained.out / "README.md").read_text(encoding="utf-8")
    assert f"folder, picture = {str(trained.out)!r}" in card and "Quax, blib blab, red_zorx" in card
    picture = next((demo.input / "validation_data" / "ragno").iterdir())
    card = (demo.checkpoint / "README.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", card.replace("'temp/demo", f"'{demo.root}"), re.S)
    assert len(code.splitlines()) == 10
    code = code.replace('"picture.jpg"', repr(str(picture)))
    code += "\nassert (inputs['input_ids'] == processor.tokenizer.bos_token_id).sum() == 1"
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    scorer, model = load_scorer(str(demo.checkpoint), settings_for(Config(), str(demo.checkpoint)), "bfloat16")
    best = scorer.score(model, scorer.collate([load_picture(picture)])).argmax()
    assert done.stdout.strip() == scorer.labels[best]
