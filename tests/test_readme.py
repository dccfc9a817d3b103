"""The two READMEs name the same commands, and nothing that is not there; scripts/README.md's code runs."""

import csv
import re
from pathlib import Path

import pytest
import second_reader_vllm

from config import Config
from tests.conftest import ROOT

BOTH = ("README.md", "README.zh-CN.md")


def commands(name):
    """Every command of a README: the lines of its sh blocks without comments, and what stands in backticks."""
    text = (ROOT / name).read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.S))
    lines = [re.sub(r"\s+#.*", "", line).strip() for line in blocks.splitlines()]
    inline = re.findall(r"`((?:sh|python|pip|hf|modelscope|tensorboard) [^`]+)`", text)
    return sorted(set(filter(None, lines + inline)))


def test_both_name_the_same_commands():
    english, chinese = map(commands, BOTH)
    assert english == chinese and "sh demo/run.sh" in english and len(english) > 15


@pytest.mark.parametrize("name", BOTH)
def test_what_they_name_is_there(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    links = [target for target in re.findall(r"\]\(([^)]+)\)", text) if not target.startswith("http")]
    scripts = re.findall(r"(?:sh|python) ((?:\w+/)*\w+\.(?:sh|py))", text)
    files = re.findall(r"`((?:\w+/)?[\w-]+\.(?:py|sh|html|txt|json|yaml))`", text)
    made = {
        "zero_to_fp32.py",
        "predictions.csv",
        "report.html",
        "report.json",
        "run.json",
        "task.json",
        "temp/audit.html",
        "temp/train.json",
        "temp/validation.json",
    }
    missing = [file for file in {*links, *scripts, *files} - made if not Path(ROOT, file).exists()]
    assert not missing and len(scripts) > 8


def test_request_to_vllm_asks_what_was_learned():
    """tests/helpers/second_reader.sh sends it to vLLM, which is not installed here."""
    config, (_, _, body, _) = Config(), second_reader_vllm.documented()
    assert [part["type"] for part in body["messages"][0]["content"]] == ["image_url", "text"]
    assert body["messages"][0]["content"][1]["text"] == config.question and body["add_special_tokens"] is True
    assert body["structured_outputs"]["choice"] == [f" {config.answer_for(label)}" for label in config.labels]


def test_pipeline_of_transformers_names_the_animal(demo, capsys):
    with open(demo.root / "logs" / "validation" / "sft-llava-demo" / "predictions.csv", newline="") as file:
        row = max(csv.DictReader(file), key=lambda row: float(row["probability"]))
    code = second_reader_vllm.documented()[3]
    code = code.replace(second_reader_vllm.FOLDER, str(demo.checkpoint)).replace(
        second_reader_vllm.PICTURE, row["image"]
    )
    exec(code, {})
    assert capsys.readouterr().out.split() == [row["prediction"]]
