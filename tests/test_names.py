"""Names are data: labels, folders and files whose names are HTML, templates, Markdown, formulas, flags or commands."""

import ast
import csv
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from html import escape
from types import SimpleNamespace

import markdown
import pytest
from PIL import Image

from animals.files import read_csv, write_csv_rows
from animals.training.trainer import AnimalTrainer
from config import Config
from tests.conftest import ROOT
from tests.helpers.browser import Browser, find_chromium

LABELS = [
    "<img src=x onerror=document.title=1>", "</script><script>document.title=2</script>", "{{7*7}}", "{% raw %}",
    "-dash", "=1+1", "`tick` ---", 'it\'s "q" \\', "@at", "$(id) ${x}",
]  # fmt: skip
FILES = ["-x.jpg", "=1.jpg", "<svg onload=document.title=3>.jpg", "{{7*7}} 'q' `b` $(id).jpg", "javascript:x.jpg"]
FOLDER = "o`ut <i>{{7*7}} =$(id)"


@pytest.fixture(scope="module")
def named(demo, tmp_path_factory):
    """A folder with pictures of such names, and the demo's checkpoint with such a name and such labels."""
    root = tmp_path_factory.mktemp("names")
    shutil.copytree(demo.checkpoint, root / FOLDER, ignore=shutil.ignore_patterns("checkpoint-*"))
    task = json.loads((root / FOLDER / "task.json").read_text())
    task["folder_to_label"] = dict(zip(LABELS, LABELS, strict=True))
    (root / FOLDER / "task.json").write_text(json.dumps(task))
    (root / "pictures").mkdir()
    for i, name in enumerate(FILES):
        Image.new("RGB", (20, 20), (40 * i, 90, 200)).save(root / "pictures" / name)
    return root


def test_csv_gives_the_names_back(tmp_path):
    starts = "=", "+", "-", "@", "'", "'=", "\t", "\r", "<", ""
    names = [start + text for start in starts for text in ("1+1", "a;b,c")]
    names += ["it's", "'", "''", "two\nlines", 'a "word"']
    with open(tmp_path / "names.csv", "w", newline="", encoding="utf-8") as file:
        write_csv_rows(file, [["image"], *([name] for name in names)])
    columns, rows = read_csv(tmp_path / "names.csv")
    assert columns == ["image"] and [row["image"] for row in rows] == names
    cells = [row[0] for row in csv.reader(io.StringIO((tmp_path / "names.csv").read_bytes().decode(), newline=""))]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t", "\r"))], "a spreadsheet runs it"
    assert cells[1] == "'=1+1"


@pytest.mark.parametrize("prompt", ["Which?\n---\n# one of {labels}", "<b>{labels}</b> ``` \N{CAT FACE} {{7*7}}"])
def test_the_card(tmp_path, prompt):
    """Its Markdown shows the names as they are, and its Python code has them as literals."""
    config = Config(folder_to_label=dict(zip(LABELS, LABELS, strict=True)), prompt=prompt)
    folder = tmp_path / FOLDER
    folder.mkdir()
    trainer = SimpleNamespace(
        state=SimpleNamespace(log_history=[], global_step=2, max_steps=2),
        args=SimpleNamespace(output_dir=str(folder)),
        scorer=SimpleNamespace(config=config, labels=config.labels, answers=[[1]]),
        record={"effective_batch": 4, "training": {}, "versions": {}},
    )
    AnimalTrainer.create_model_card(trainer)
    front, card = (folder / "README.md").read_text(encoding="utf-8").split("\n---\n\n", 1)
    assert len(front.splitlines()) == 3
    html = markdown.markdown(card, extensions=["fenced_code"])
    assert set(re.findall(r"<(\w+)", html)) == {"h1", "p", "ul", "li", "code", "pre"} and html.count("<h1>") == 1
    for text in (FOLDER, ", ".join(LABELS), " ".join(config.question.split())):
        assert f"<code>{escape(text, quote=False)}</code>" in html
    [code] = re.findall(r"^```python\n(.*?)^```$", card, re.S | re.M)
    places, question = ast.parse(code).body[1:3]
    assert ast.literal_eval(places.value) == (str(folder), "picture.jpg")
    assert ast.literal_eval(question.value) == config.question


def test_the_pages(named, run, tmp_path):
    """The contact sheet and the local page in a browser: every name is text, none is run."""
    if not find_chromium():
        pytest.skip("no chromium on PATH (Debian: apt-get install chromium)")
    model, pictures = shlex.quote(str(named / FOLDER)), shlex.quote(str(named / "pictures"))
    flags = f"{pictures} --model_name_or_path {model} --language en"
    run(f"python test.py {flags} --output {tmp_path}/names.csv --html", code=0)
    command = [sys.executable, "scripts/serve.py", *shlex.split(flags), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server, Browser(tmp_path / "b") as browser:
        url = re.match(r"http://\S+", server.stdout.readline())[0]
        browser.open((tmp_path / "names.html").as_uri())
        assert set(browser.js("[...document.querySelectorAll('.file')].map(e => e.textContent)")) == set(FILES)
        headings = browser.js("[...document.querySelectorAll('h2')].slice(1).map(e => e.firstChild.data.trim())")
        assert headings and set(headings) <= set(LABELS)
        links = browser.js("[...document.querySelectorAll('a:has(img)')].map(a => a.href)")
        assert set(links) == {(named / "pictures" / name).as_uri() for name in FILES}
        assert not browser.js("document.title").isdigit()
        browser.open(url)
        assert browser.js("[...document.querySelectorAll('#examples img')].map(e => e.alt)") == sorted(FILES)
        assert str(named / FOLDER) in browser.js("document.querySelector('header').textContent")
        browser.js("document.querySelector('#examples button').click()")
        bars = "[...document.querySelectorAll('.bars span')]"
        shown = browser.wait_for(f"{bars}.length && {bars}.map(e => e.innerText)")
        assert sorted(shown) == sorted(LABELS)
        assert not browser.js("document.title").isdigit() and not browser.js("document.querySelector('i:not([style])')")
        server.kill()


def test_the_terminal(demo, tmp_path):
    """Names of places that act on a terminal are refused; a file that looks like a flag is told apart."""
    (tmp_path / "-x.jpg").write_bytes(b"")
    given = f"--model_name_or_path {demo.checkpoint}"
    for command, message in {
        f"test.py -x.jpg {given}": "-x.jpg: found the name of a file where a flag was expected; write ./-x.jpg",
        "test.py --output a\033[31m.csv": r"--output: found 'a\x1b[31m.csv'; expected a name in UTF-8 without control",
        "validation.py --report_dir a\rb": r"--report_dir: found 'a\rb'; expected a name in UTF-8 without control",
        f"scripts/launch.py train.py --config_file {ROOT}/scripts/ddp.yaml --output_dir a\x9bb": "--output_dir: found",
        "data_process_utils.py --input_dir a\u202eb": r"--input_dir: found 'a\u202eb'; expected a name in UTF-8",
        "scripts/serve.py --model_name_or_path a\nb": r"--model_name_or_path: found 'a\nb'; expected a name in UTF-8",
    }.items():
        script, *words = command.split(" ")
        words = [sys.executable, ROOT / script, *words]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert done.stderr.startswith(f"error: {message}")
