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

from animals.checkpoint.task import how_to_ask, other_words, read_task, settings_for, task_of, write_task
from animals.command import UserError
from animals.pictures.read import load_picture
from animals.scoring.scorer import load_scorer
from config import ANSWER, CHAT_TEMPLATE, FOLDER_TO_LABEL, PROMPT, Config

TABLE = {"cat": "kitty", "ragno": "spider"}
TASK = {
    "image_view": "tiles",
    "folder_to_label": TABLE,
    "prompt": "Who? {labels}",
    "answer": "A {label}.",
    "chat_template": "its own",
}


@pytest.fixture
def tuned(tmp_path):
    """A folder with a task.json and no weights."""
    write_task(tmp_path, TASK)
    return tmp_path


# --- what wins ------------------------------------------------------------------------------------------------------


def test_config_py_then_the_checkpoint_then_flags(tuned, tmp_path):
    assert task_of(settings_for(Config(), "no/such/folder")) == {
        "folder_to_label": FOLDER_TO_LABEL,
        "prompt": PROMPT,
        "answer": ANSWER,
        "image_view": "tiles",
        "chat_template": CHAT_TEMPLATE,
    }
    assert task_of(settings_for(Config(), tuned)) == TASK
    same = settings_for(Config(prompt="Who? {labels}", max_excluded=0.5), tuned)
    assert task_of(same) == TASK and same.max_excluded == 0.5
    assert task_of(settings_for(same, tuned)) == TASK, "asked twice is asked once"
    new = settings_for(Config(prompt="Now?"), tuned, training=True)
    assert task_of(new) == TASK | {"prompt": "Now?"}
    assert other_words(new, tuned) == [
        f'--prompt: found "Now?"; expected "Who? {{labels}}", with which {tuned} was trained'
    ]
    assert other_words(Config(prompt="Now?"), "no/such/folder") == other_words(Config(), tuned) == []


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
def test_scoring_with_other_words_is_refused_with_both(tuned, flags, found, trained):
    with pytest.raises(UserError) as error:
        settings_for(Config(**flags), tuned)
    (name,), (line,) = flags, str(error.value).splitlines()
    assert line.startswith(f"--{name}: found {found}; expected {trained}") and str(tuned) in line


def test_pictures_in_folders_of_other_names_are_no_contradiction(tuned):
    table = {"gatto": "kitty", "cat": "kitty", "spin": "spider"}
    config = settings_for(Config(folder_to_label=table), tuned)
    assert config.folder_to_label == table and config.labels == ["kitty", "spider"] and config.prompt == TASK["prompt"]


def test_where_it_is_looked_for(tmp_path):
    """An adapter's own before its base's; a folder of checkpoint-N answers with the newest's, a model's with none."""
    base, adapter, run = tmp_path / "base", tmp_path / "adapter", tmp_path / "run"
    for folder in (base, adapter, run / "checkpoint-9", run / "checkpoint-10"):
        folder.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    assert read_task(adapter) is None
    write_task(base, TASK)
    assert read_task(adapter) == TASK
    write_task(adapter, TASK | {"answer": "{label}"})
    assert read_task(adapter)["answer"] == "{label}"
    write_task(run / "checkpoint-9", TASK)
    write_task(run / "checkpoint-10", TASK | {"prompt": "newest"})
    assert read_task(run)["prompt"] == "newest"
    (run / "config.json").write_text("{}")
    assert read_task(run) is None


def test_a_task_json_of_something_else_is_one_line(tuned):
    (tuned / "task.json").write_text('{"prompt": "Who?"}')
    with pytest.raises(UserError, match="found no folder_to_label, answer, chat_template in it; expected what"):
        settings_for(Config(), tuned)


# --- labels from the folders ------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("table", ["folder", "[1]", "{}", '{"cat": 1}', '{"cat": ""}'])
def test_what_is_no_table_is_one_line(table):
    with pytest.raises(UserError, match='--folder_to_label: .*; expected JSON like {"ragno": "spider"}'):
        Config(folder_to_label=table)


# --- the whole path ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(demo, run, tmp_path_factory):
    """Three folders of invented names, another question and answer, 2 steps with a checkpoint and an evaluation."""
    tmp = tmp_path_factory.mktemp("invented")
    for split, n in (("train_data", 6), ("validation_data", 4)):
        for i, name in enumerate(("red_zorx", "Quax", "blib blab")):
            (tmp / "input" / split / name).mkdir(parents=True)
            for j in range(n):
                Image.effect_noise((70 + 20 * i, 90), 40 + 9 * j + i).convert("RGB").save(
                    tmp / "input" / split / name / f"{split}{i}{j}.png"
                )
    data = f"--input_dir {tmp}/input --temp_dir {tmp}/cache --logging_dir {tmp}/logs"
    words = "--folder_to_label folders --prompt 'Zorx or what? {labels}' --answer 'It is {label}.'"
    where = SimpleNamespace(out=tmp / "sft", data=data, words=words, input=tmp / "input")
    done = run(
        f"sh train.sh {data} {words} --model_name_or_path {demo.model} --output_dir {where.out} --max_steps 2 "
        "--save_steps 2 --eval_steps 2 --eval_pictures 9 --learning_rate 1e-3 --gradient_accumulation_steps 1"
    )
    assert done.code == 0, done.output[-3000:]
    return where


def test_every_saved_folder_says_what_it_was_trained_on(trained):
    labels = ["Quax", "blib blab", "red_zorx"]
    for folder in (trained.out, trained.out / "checkpoint-2"):
        assert json.loads((folder / "task.json").read_text(encoding="utf-8")) == {
            "folder_to_label": {label: label for label in labels},
            "prompt": "Zorx or what? {labels}",
            "answer": "It is {label}.",
            "chat_template": CHAT_TEMPLATE,
            "image_view": "tiles",
        }
        config = json.loads((folder / "config.json").read_text())
        assert config["id2label"] == dict(zip("012", labels, strict=True))
        assert config["label2id"] == {label: i for i, label in enumerate(labels)}
        assert "<s>" not in json.loads((folder / "chat_template.json").read_text())["chat_template"], "the hub's"
    rows = json.loads((trained.input.parent / "cache" / "train.json").read_text(encoding="utf-8"))
    assert rows[0]["messages"] == Config(
        folder_to_label={label: label for label in labels}, prompt="Zorx or what? {labels}", answer="It is {label}."
    ).conversation("Quax")


def test_plain_commands_score_with_the_trained_words(trained, run, tmp_path):
    """No flag says labels or question: the accuracy of the last evaluation, test.py's labels; other words exit 2."""
    flags = f"{trained.data} --model_name_or_path {trained.out}"
    done = run(f"sh validation.sh {flags} --on_eval_pictures --eval_pictures 9 --report_dir {tmp_path}/report")
    assert done.code == 0, done.output[-3000:]
    said = json.loads(done.output.strip().splitlines()[-1])
    history = json.loads((trained.out / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    last = [log for log in history if "eval_accuracy" in log][-1]
    assert (said["n"], said["accuracy"], said["macro_f1"]) == (9, last["eval_accuracy"], last["eval_macro_f1"])
    done = run(
        f"python test.py {trained.input}/validation_data --model_name_or_path {trained.out} --output {tmp_path}/n.csv"
    )
    assert done.code == 0, done.output[-3000:]
    with open(tmp_path / "n.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 and list(rows[0])[-3:] == ["Quax", "blib blab", "red_zorx"]
    for command in ("sh validation.sh", "python validation.py", "python test.py"):
        done = run(f"{command} --prompt other --model_name_or_path {trained.out}")
        assert done.code == 2 and done.output.count("\n") == 1, done.output
        assert 'error: --prompt: found "other"; expected "Zorx or what? {labels}"' in done.output


FLOAT32 = {"CPU_BF16_SPEED": 0.01}  # as on a CPU without bf16 instructions: near ties are not decided by rounding
KITTY = """--folder_to_label '{"cat": "kitty", "dog": "dog", "ragno": "spider"}' --prompt 'Which one? {labels}.'"""


@pytest.fixture(scope="module", params=["table", "120 folders"])
def walked(request, demo, run, tmp_path_factory):
    """Three of the demo's folders under other words; 120 of invented names. Trained, evaluated on all held out."""
    tmp, many = tmp_path_factory.mktemp("walked"), request.param != "table"
    labels = ["kitty", "dog", "spider"] if not many else [a + b for a in "abcdefghij" for b in "klmnopqrstuv"]
    for split, n in (("train_data", 2), ("validation_data", 1)) if many else ():
        for k, name in enumerate(labels):
            folder = tmp / "input" / split / name
            folder.mkdir(parents=True)
            for i in range(n):
                noise = Image.effect_noise((40 + k % 3 * 20, 40), 60 + k + 7 * n + i)
                noise.convert("RGB").save(folder / f"{i}.png")
    for split, n in () if many else (("train_data", 16), ("validation_data", 12)):
        for name in ("cat", "dog", "ragno"):
            (tmp / "input" / split / name).mkdir(parents=True)
            for path in sorted((demo.input / split / name).iterdir())[:n]:
                shutil.copy(path, tmp / "input" / split / name)
    prompt = "What is this?" if many else "Which one? {labels}."
    words = f"--folder_to_label folders --prompt '{prompt}'" if many else KITTY
    where = SimpleNamespace(out=tmp / "sft", input=tmp / "input", labels=labels, prompt=prompt)
    where.data = f"--input_dir {tmp}/input --temp_dir {tmp}/cache --logging_dir {tmp}/logs"
    done = run(
        f"sh train.sh {where.data} {words} --output_dir {where.out} --max_steps 2 --save_steps 2 --eval_steps 2 "
        f"--model_name_or_path {demo.model if many else demo.checkpoint} --learning_rate 1e-3 --eval_on_start False "
        "--eval_pictures 0 --gradient_accumulation_steps 1",
        **FLOAT32,
    )
    assert done.code == 0, done.output[-3000:]
    return where


def test_no_flag_is_needed_to_score_what_was_trained(walked, run, tmp_path):
    """Plain validation.sh and test.py: the trained labels, and the accuracy of the training's last evaluation."""
    where = f"{walked.data} --model_name_or_path {walked.out}"
    done = run(f"sh validation.sh {where} --report_dir {tmp_path}", **FLOAT32)
    assert done.code == 0, done.output[-3000:]
    report = json.loads((tmp_path / "sft" / "report.json").read_text(encoding="utf-8"))
    history = json.loads((walked.out / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    [last] = [log for log in history if "eval_accuracy" in log]
    assert last["eval_pictures"] == report["n"] == (36 if len(walked.labels) == 3 else 120)
    assert (report["accuracy"], report["macro_f1"]) == (last["eval_accuracy"], last["eval_macro_f1"])
    assert len(walked.labels) > 3 or report["accuracy"] > 0.4, "not one answer to everything"
    assert sorted(report["labels"]) == sorted(walked.labels)
    assert report["question"] == walked.prompt.replace("{labels}", ", ".join(report["labels"]))
    with Image.open(tmp_path / "sft" / "confusion_matrix.png") as picture:
        assert max(picture.size) < 4096, "120 labels are not drawn as 10 are"
    pictures = " ".join(f"'{path}'" for path in sorted(walked.input.glob("validation_data/*/*"))[:24:8])
    done = run(f"python test.py {pictures} --model_name_or_path {walked.out} --output {tmp_path}/n.csv", **FLOAT32)
    assert done.code == 0, done.output[-3000:]
    with open(tmp_path / "n.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 and list(rows[0])[-len(walked.labels) :] == report["labels"]
    with open(tmp_path / "sft" / "predictions.csv", newline="", encoding="utf-8") as file:
        scored = {row["image"]: row for row in csv.DictReader(file)}
    for row in rows:
        for label in report["labels"]:
            assert float(row[label]) == pytest.approx(float(scored[row["image"]][label]), abs=0.02)  # a GPU: bf16
    done = run(f"sh validation.sh {where} --prompt other")
    said = json.dumps(walked.prompt)
    assert done.code == 2 and f'error: --prompt: found "other"; expected {said}' in done.output, done.output


def test_the_trained_scorer_equals_teacher_forcing(walked):
    """log p of the answer's tokens and </s>, one label at a time, in float32."""
    scorer, model = load_scorer(str(walked.out), Config(), "float32")
    assert sorted(scorer.labels) == sorted(walked.labels)
    picture, config = load_picture(next(walked.input.glob("validation_data/*/*"))), scorer.config
    ours = scorer.score(model, scorer.collate([picture]))[0]

    def encode(label=None):
        text = scorer.processor.apply_chat_template(
            config.conversation(label), chat_template=config.chat_template, tokenize=False
        )
        return scorer.processor(images=picture, text=text, add_special_tokens=False, return_tensors="pt")

    prompt = encode()["input_ids"].shape[1]
    for label, score in zip(scorer.labels, ours.tolist(), strict=True):
        inputs = encode(label)
        with torch.inference_mode():
            log_p = model(**inputs).logits.float().log_softmax(-1)[0]
        ids = inputs["input_ids"][0].tolist()
        alone = sum(log_p[i - 1, ids[i]].item() for i in range(prompt, len(ids)))
        assert abs(alone - score) < 1e-4, (label, alone, score)


def test_training_on_top_with_other_words_is_said_and_recorded(trained, run, tmp_path):
    done = run(
        f"sh train.sh {trained.data} --model_name_or_path {trained.out} --output_dir {tmp_path}/sft "
        "--answer '{label}' --max_steps 1 --save_strategy no --eval_strategy no --gradient_accumulation_steps 1"
    )
    assert done.code == 0, done.output[-3000:]
    assert done.output.count('--answer: found "{label}"; expected "It is {label}."') == 1
    before, after = (json.loads((path / "task.json").read_text()) for path in (trained.out, tmp_path / "sft"))
    assert after == before | {"answer": "{label}"}


def test_the_card_shows_how_to_ask_and_that_works(trained, demo):
    """Its ten lines, in a process that knows nothing of ours, on a model that learned something."""
    three = Config(folder_to_label="folders", input_dir=str(trained.input), prompt="Zorx or what? {labels}")
    card = (trained.out / "README.md").read_text(encoding="utf-8")
    [tokens] = re.findall(r"max_new_tokens=(\d+)", card)
    assert how_to_ask(str(trained.out), three, tokens) in card and "Quax, blib blab, red_zorx" in card
    picture = demo.input / "validation_data" / "ragno"
    picture = next(picture.iterdir())
    code = how_to_ask(str(demo.checkpoint), Config(), 6).removeprefix("```python\n").removesuffix("```")
    assert len(code.splitlines()) == 10
    code = code.replace('"picture.jpg"', repr(str(picture)))
    code += "\nassert (inputs['input_ids'] == processor.tokenizer.bos_token_id).sum() == 1"
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    scorer, model = load_scorer(str(demo.checkpoint), Config(), "bfloat16")
    best = scorer.score(model, scorer.collate([load_picture(picture)])).argmax()
    assert done.stdout.strip() == scorer.labels[best]
