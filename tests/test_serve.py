"""scripts/serve.py: a picture dropped, chosen, photographed, sent by a program; pages of others; and how it ends."""

import csv
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
from PIL import Image

from animals.pictures.read import list_pictures, load_picture
from config import Config
from scripts.serve import MAX_UPLOAD
from tests.helpers.browser import Browser, find_chromium

LABELS = Config().labels
BARS = "[...document.querySelectorAll('#answer .bars li')]"
TEN_BARS = f"{BARS}.length == 10"
PROBABILITIES = f"Object.fromEntries({BARS}.map(li => [li.dataset.label, +li.dataset.probability]))"
PICTURE_SHAPE = "(i => i.naturalWidth && [i.naturalWidth, i.naturalHeight])(document.querySelector('#answer img'))"


@pytest.fixture(scope="module")
def pictures(demo, tmp_path_factory):
    """Pictures, and two files that cannot be named: a text and a decompression bomb."""
    folder = tmp_path_factory.mktemp("pictures")
    originals = list_pictures(str(demo.input / "validation_data"))[:: 300 // 18]
    for i, path in enumerate(originals):
        (folder / f"{i:02}.jpg").write_bytes(Path(path).read_bytes())
    load_picture(originals[0]).save(folder / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter
    load_picture(originals[1]).crop((0, 0, 90, 60)).save(folder / "turned.jpg", exif=exif)
    (folder / "text.jpg").write_text("no picture")
    Image.new("1", (10_000, 10_000)).save(folder / "bomb.png")
    return folder


@pytest.fixture(scope="module")
def served(run, demo, pictures, tmp_path_factory):
    """A running server, and what the CSV says of the same pictures."""
    output = tmp_path_factory.mktemp("names") / "names.csv"
    flags = f"{pictures} --model_name_or_path {demo.checkpoint} --dtype float32 --min_probability 0.9"
    run(f"python test.py {flags} --output {output} --per_device_eval_batch_size 1", code=0)
    with open(output, newline="", encoding="utf-8") as file:
        rows = {Path(row["image"]).name: row for row in csv.DictReader(file)}
    command = [sys.executable, "scripts/serve.py", *flags.split(), "--port", "0", "--language", "en"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    url = re.match(r"http://\S+", process.stdout.readline())[0]
    yield SimpleNamespace(process=process, url=url, port=urlsplit(url).port, rows=rows)
    process.kill()
    process.wait()


def ask(port, method, path, body=None, **headers):
    """(status, text); a header given as None is left out."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    connection.request(method, path, body, {key.replace("_", "-"): value for key, value in headers.items()})
    answer = connection.getresponse()
    return answer.status, answer.read().decode(errors="replace")


def test_twenty_at_once_say_what_the_csv_says(served, pictures):
    assert len(served.rows) >= 20
    with ThreadPoolExecutor(len(served.rows)) as threads:
        contents = [(pictures / name).read_bytes() for name in served.rows]
        answers = list(threads.map(lambda content: ask(served.port, "POST", "/name", content), contents))
    for row, (status, text) in zip(served.rows.values(), answers, strict=True):
        answer = json.loads(text)
        if row["error"]:
            assert status == 400 and answer == {"error": f"This picture cannot be used: {row['error']}."}
            continue
        assert status == 200 and answer["prediction"] == row["prediction"]
        found = {one["label"]: one["probability"] for one in answer["probabilities"]}
        assert found == pytest.approx({label: float(row[label]) for label in LABELS}, abs=1e-5)
    assert [status for status, _ in answers].count(400) == 2
    assert {row["prediction"] for row in served.rows.values()} > {"unsure"}


def test_only_its_own_page_may_ask(served, pictures):
    picture, port, here = (pictures / "a.png").read_bytes(), served.port, f"127.0.0.1:{served.port}"
    assert ask(port, "POST", "/name", picture, Origin=f"http://{here}")[0] == 200
    assert ask(port, "GET", "/", Host=f"localhost:{port}")[0] == 200
    for headers in (
        {"Host": f"evil.example:{port}"},  # a foreign name that leads to 127.0.0.1
        {"Host": here, "Origin": "http://evil.example"},
        {"Host": here, "Origin": "null"},
        {"Host": here, "Origin": f"http://localhost:{port + 1}"},
        {"Host": here, "Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "no-cors"},
    ):
        for method, path in (("POST", "/name"), ("GET", "/example/0")):
            status, text = ask(port, method, path, picture if method == "POST" else None, **headers)
            assert (status, "Only this server's own page" in text) == (403, True), headers
    assert ask(port, "GET", "/example/0")[0] == 200
    wrong = "/example/12", "/example/99", "/example/-1", "/example/..%2f", "/etc"  # there are twelve
    assert [ask(port, "GET", path)[0] for path in wrong] == [404] * 5 and ask(port, "GET", "/example/11")[0] == 200
    with pytest.raises(ConnectionRefusedError):  # bound to 127.0.0.1, not to all of the machine's addresses
        socket.create_connection(("127.0.0.2", port), 10)
    status, text = ask(port, "POST", "/name", b"", Content_Length=str(MAX_UPLOAD + 1))
    assert status == 413 and "too large: more than 64 MB" in text


def test_in_chromium(served, pictures, tmp_path):
    if not find_chromium():
        pytest.skip("no chromium on PATH (Debian: apt-get install chromium)")
    with Browser(tmp_path) as browser:
        for width in (390, 1280):
            browser.view(width, dark=width == 390)
            browser.open(served.url)
            browser.wait_for("[...document.images].length == 12 && [...document.images].every(i => i.naturalWidth)")
            for name in ("a.png", "turned.jpg", "text.jpg", "bomb.png"):
                browser.js("document.getElementById('answer').replaceChildren()")
                browser.drop(pictures / name, 100, 60)
                row = served.rows[name]
                if row["error"]:
                    browser.wait_for("document.querySelectorAll('#answer .warning').length")
                    assert row["error"] in browser.js("document.querySelector('#answer').innerText")
                else:
                    browser.wait_for(TEN_BARS)
                    found = browser.js(PROBABILITIES)
                    assert found == pytest.approx({label: float(row[label]) for label in LABELS}, abs=1e-4)
                    assert browser.js("document.querySelector('#answer .score').innerText") == row["prediction"]
                    shape = browser.wait_for(PICTURE_SHAPE)
                    assert name != "turned.jpg" or shape == [60, 90], "upright"
                assert browser.js("document.documentElement.scrollWidth <= innerWidth")
            browser.js("document.querySelector('#examples button').click()")
            browser.wait_for(TEN_BARS)
        browser.js("document.getElementById('answer').replaceChildren(); document.getElementById('camera').click()")
        browser.wait_for("document.querySelector('video').videoWidth && !document.getElementById('live').hidden")
        browser.js("document.getElementById('shoot').click()")
        browser.wait_for(TEN_BARS)
        asked = {urlsplit(url).netloc for url in browser.requests() if url.startswith("http")}
        assert asked == {urlsplit(served.url).netloc}
        assert [text for text in browser.complaints() if "400" not in text] == []  # a picture that cannot be used
        browser.open("data:text/html,another origin")
        fetch = f"fetch('{served.url}name', {{method: 'POST', body: 'x'}}).then(() => 'answered', () => 'refused')"
        assert browser.js(fetch) == "refused"


def test_it_ends_within_two_seconds(served, pictures):
    """While it computes, too. The last test of this file: the server is gone afterwards."""
    with ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(ask, served.port, "POST", "/name", (pictures / "a.png").read_bytes()) for _ in range(4)]
        started = time.monotonic()
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(60) == 0
        assert time.monotonic() - started < 2
        [one.exception() for one in asked]


@pytest.mark.parametrize("flags", ["--host 127.0.0.1 --port {taken}", "--host 192.0.2.1 --port 7860"])
def test_mistakes_get_one_line(run, demo, flags):
    with socket.create_server(("127.0.0.1", 0)) as busy:
        flags = flags.format(taken=busy.getsockname()[1])
        done = run(f"python scripts/serve.py --model_name_or_path {demo.checkpoint} {flags}")
    assert (done.code, done.output.count("\n")) == (2, 1), done.output
    assert re.match(f"error: {flags}: found .*expected a free address", done.output)
