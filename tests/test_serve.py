"""scripts/serve.py: a picture dropped, chosen, photographed, sent by a program; pages of others; and how it ends."""

import contextlib
import csv
import http.client
import io
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
from PIL import Image

from animals.command import UserError
from animals.pictures.read import list_pictures, load_picture
from config import Config
from scripts.serve import MAX_UPLOAD, Server
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
    said = output.with_name("stderr")
    with open(said, "w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    url = re.match(r"http://\S+", process.stdout.readline())[0]
    yield SimpleNamespace(process=process, url=url, port=urlsplit(url).port, rows=rows, said=said)
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
    for name in ("localhost", "LOCALHOST", "[::1]", socket.gethostname()):
        assert ask(port, "GET", "/", Host=f"{name}:{port}")[0] == 200
    hosts = f"evil.example:{port} {here}@evil.example evil.example@{here}"  # the first may lead to 127.0.0.1
    hosts += f" 192.0.2.1:{port} 127.1:{port} 127.0.0.1:{port + 1} 127.0.0.1 127.0.0.1:0{port} [::1]]:{port}"
    for headers in (
        *({"Host": host} for host in hosts.split()),
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


def sent(port, content, half_close=False):
    """An open connection, on which `content` was sent."""
    connection = socket.create_connection(("127.0.0.1", port), 60)
    with contextlib.suppress(ConnectionError):  # the answer may come before everything is sent
        connection.sendall(content)
    if half_close:
        connection.shutdown(socket.SHUT_WR)
    return connection


def status_of(connection):
    """The status that the server answers; None if it ends the connection without an answer."""
    with connection, contextlib.suppress(ConnectionError):
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        return int(answer.split()[1]) if answer else None


def drip(connection):
    """Send a byte every half second, until the server ends the connection."""
    with connection, contextlib.suppress(ConnectionError):
        while connection.send(b"x"):
            time.sleep(0.5)


def upload(port, length, content=b"", *headers):
    lines = f"POST /name HTTP/1.1|Host: 127.0.0.1:{port}|Content-Length: {length}".split("|") + list(headers)
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + content


def test_held_connections_and_uploads_do_not_stop_it(served, pictures):
    """Requests of which the end never comes: four large uploads are held, no more, and a good picture is named."""
    good, port = (pictures / "a.png").read_bytes(), served.port
    half_open = [sent(port, upload(port, 9)[:-2]) for _ in range(320)]
    uploads = [sent(port, upload(port, 59_000_000, bytes(1000))) for _ in range(30)]
    slow, started = sent(port, upload(port, 1000)), time.monotonic()
    dripping = threading.Thread(target=drip, args=(slow,))
    dripping.start()
    assert ask(port, "POST", "/name", good)[0] == 200
    assert time.monotonic() - started < 10
    assert Counter(map(status_of, uploads)) == {503: 26, None: 4}
    assert Counter(map(status_of, half_open)) == {None: 320}
    dripping.join()
    assert time.monotonic() - started < 20, "each is given 10 seconds"
    status, text = ask(port, "POST", "/name", good)
    assert status == 200 and "Traceback" not in served.said.read_text()


def test_what_is_no_request_is_refused_in_one_line(served, pictures):
    good, port, host = (pictures / "a.png").read_bytes(), served.port, f"Host: 127.0.0.1:{served.port}"
    for status, content in [
        (400, upload(port, 5, b"hello", "Transfer-Encoding: chunked")),
        (400, f"POST /name HTTP/1.1\r\n{host}\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n".encode()),
        (400, f"POST /name HTTP/1.1\r\n{host}\r\n\r\n".encode()),
        (400, upload(port, 5, b"hello", "Content-Length: 6")),
        *[(400, upload(port, length, b"hello")) for length in (-5, "five", "+5", "5, 5", "0x5", "\xb2", "", 50)],
        (413, upload(port, "9" * 5000, b"hello")),
        (404, f"GET /example/{'9' * 5000} HTTP/1.1\r\n{host}\r\n\r\n".encode()),
        (404, f"GET /example/\N{ARABIC-INDIC DIGIT ONE} HTTP/1.1\r\n{host}\r\n\r\n".encode()),
        (404, f"GET /example/%D9%A1 HTTP/1.1\r\n{host}\r\n\r\n".encode()),
        (403, f"GET / HTTP/1.1\r\n{host}\r\n{host}\r\n\r\n".encode()),
        (403, b"GET / HTTP/1.1\r\n\r\n"),
        (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 a TLS hello \n"),
        (400, b"GET / HTTP/x.y\r\n\r\n"),
        (400, b"<script>\r\n\r\n"),
        (505, b"GET / HTTP/9.0\r\n\r\n"),
        (501, b"BREW / HTTP/1.1\r\n\r\n"),
        (414, b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n"),
        (431, b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 300 + b"\r\n"),
        (431, b"GET / HTTP/1.1\r\na: " + b"b" * 70_000 + b"\r\n\r\n"),
        (None, b""),
        (None, b"\r\n\r\n"),
    ]:
        assert status_of(sent(port, content, half_close=True)) == status, content[:200]
    for content in (upload(port, len(good), good), upload(port, len(good), good[:9]), b"GET / HTTP/1.1\r\nHo"):
        for _ in range(20):  # closed with a reset, while the server reads, computes or answers
            connection = sent(port, content)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
    assert ask(port, "POST", "/name", good)[0] == 200
    assert served.said.read_text().count("\n") == 1, "that the CPU computes"


def test_pictures_that_cost_long_do_not_delay_others(served, pictures):
    """A small file may have 64 million pixels: such pictures wait for one another, and others are named meanwhile."""
    file, done = io.BytesIO(), []
    Image.new("RGBA", (8000, 8000)).save(file, "PNG", compress_level=1)  # seconds to decode
    with ThreadPoolExecutor(4) as threads:
        slow = [threads.submit(ask, served.port, "POST", "/name", file.getvalue()) for _ in range(4)]
        for one in slow:
            one.add_done_callback(done.append)
        time.sleep(0.5)  # they are being decoded, or wait
        assert ask(served.port, "POST", "/name", (pictures / "a.png").read_bytes())[0] == 200
        assert not done
    assert {200} <= {one.result()[0] for one in slow} <= {200, 503}  # 503: it has waited for half a minute


def test_our_own_errors_are_shown(capfd):
    """An error of the program is printed with its traceback, and answered; a mistake of the user is answered."""
    args, picture = SimpleNamespace(host="127.0.0.1", min_probability=0), io.BytesIO()
    Image.new("RGB", (9, 9)).save(picture, "PNG")

    def fails(error):
        raise error

    for error, reason in ((KeyError("<ours>"), "KeyError: '<ours>'"), (UserError("found nan"), "found nan")):
        scorer = SimpleNamespace(collate=list, score=lambda model, batch, error=error: fails(error))
        with Server(socket.create_server(("127.0.0.1", 0)), scorer, None, args, "en", []) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            status, text = ask(server.server_address[1], "POST", "/name", picture.getvalue())
            server.shutdown()
        assert (status, json.loads(text)) == (500, {"error": f"The model could not answer: {reason}."})
        assert ("Traceback" in capfd.readouterr().err) == isinstance(error, KeyError)


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
