"""A local page that names pictures: drop one, and see the probability of each label.

    python scripts/serve.py                             # then open http://127.0.0.1:7860/
    python scripts/serve.py some/folder one.jpg         # with these pictures to try, not those of <input_dir>/test_data
    curl --data-binary @cat.jpg http://127.0.0.1:7860/name

The last line prints JSON: prediction, probabilities (the most probable label first), labels_mass, seconds, width and
height; or error, a sentence. The answers are those of test.py. Nothing is written. Pages of other origins are refused,
and so is a Host that is not a name or address of this server with its port. Status 503 asks to come back: see below.
"""

import contextlib
import io
import json
import math
import os
import re
import shutil
import signal
import socket
import socketserver
import sys
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import config as settings
from animals.checkpoint.check import require_checkpoint
from animals.checkpoint.task import settings_for
from animals.command import UserError, run
from animals.pictures.read import FORMATS, PictureError, list_pictures, load_picture
from animals.ranks import choose_arithmetic
from animals.scoring.page import Texts, data_uri, render, show
from animals.scoring.scorer import LOW_MASS, add_inference_flags, load_scorer, probabilities

MAX_UPLOAD = 64_000_000  # bytes; a 50-megapixel JPEG of a phone has 25,000,000
UPLOADS = 4  # uploads of MAX_UPLOAD bytes, or more and smaller ones, that memory holds at once; others get status 503
CONNECTIONS = 64  # at once; for one more, the one that has had the longest time to send its request is closed
READ_S = 10  # seconds that a connection may send nothing; and that the line and the headers of a request may take
SLOWEST = 500_000  # bytes per second; an upload that is slower by more than READ_S is closed
SMALL, LARGE = 4, 1  # pictures decoded at once: of up to SMALL_PIXELS, and larger ones; that takes 3 GB at most
SMALL_PIXELS = 16_000_000  # so that a picture of MAX_PIXELS, which takes seconds, delays no usual one
TURN_S = 30  # seconds that a request waits for its turn to be decoded and named, before it gets status 503
EXAMPLES = 12  # pictures to try on the page
SHOWN = 800  # pixels of the longest side of the picture that is sent back: as the model saw it, upright
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; img-src 'self' data:; connect-src 'self'; script-src 'unsafe-inline'; "
        "style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Connection": "close",
}


class Busy(Exception):
    """Too much is asked at once: status 503."""


class Server(socketserver.ThreadingTCPServer):
    """A model that a Handler per connection, in a thread of its own, asks. listening: a socket. examples: paths."""

    daemon_threads = True

    def __init__(self, listening, scorer, model, args, language, examples):
        super().__init__(listening.getsockname(), Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listening
        self.scorer, self.model, self.args, self.examples = scorer, model, args, examples[:EXAMPLES]
        self.language, self.texts = language, Texts(language)
        self.model_lock, self.held_lock, self.held = threading.Lock(), threading.Lock(), 0  # bytes of uploads
        self.small, self.large = threading.Semaphore(SMALL), threading.Semaphore(LARGE)
        self.deadlines = {}  # connection: the time when it is closed; infinity while nothing is awaited from it
        name = f"[{args.host}]" if ":" in args.host else args.host
        self.url = f"http://{name}:{self.server_address[1]}/"

    def process_request(self, request, client_address):
        deadlines = self.deadlines.copy()
        self.deadlines[request] = time.monotonic() + READ_S
        if len(deadlines) >= CONNECTIONS:
            first = min(deadlines, key=deadlines.get)
            self.cut(first if deadlines[first] < math.inf else request)
        super().process_request(request, client_address)

    def service_actions(self):
        """Called every half second, and after every new connection."""
        for connection, deadline in self.deadlines.copy().items():
            if deadline < time.monotonic():
                self.cut(connection)

    def cut(self, connection):
        """End a connection: its thread reads the end of the request, and leaves."""
        self.deadlines.pop(connection, None)
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)

    def close_request(self, request):
        self.deadlines.pop(request, None)
        super().close_request(request)

    def handle_error(self, request, client_address):
        """Print the traceback of an error of ours; a connection that the other side ended is none."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @contextlib.contextmanager
    def room_for(self, size):
        """with room_for(size): memory for an upload of `size` bytes. Raises Busy if there is none."""
        with self.held_lock:
            if self.held + size > UPLOADS * MAX_UPLOAD:
                raise Busy
            self.held += size
        try:
            yield
        finally:
            with self.held_lock:
                self.held -= size

    @contextlib.contextmanager
    def turn_of(self, content):
        """with turn_of(content): the picture may be decoded, and held until it is named. Raises Busy after TURN_S."""
        turn = self.small
        with contextlib.suppress(Exception), Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            turn = self.large if math.prod(picture.size) > SMALL_PIXELS else turn  # no pixel is decoded for this
        if not turn.acquire(timeout=TURN_S):
            raise Busy
        try:
            yield
        finally:
            turn.release()


class Handler(BaseHTTPRequestHandler):
    """Answers one request; the connection is closed after it."""

    protocol_version, default_request_version, timeout = "HTTP/1.1", "HTTP/1.0", READ_S

    def do_GET(self):
        self.reply(*self.answer())

    do_POST = do_GET

    def answer(self):
        """(a dict for JSON, the page, or the path of a file; the HTTP status) for a request."""
        server, path = self.server, self.path.partition("?")[0]
        if not self.is_ours():
            return self.error(403, "serve_elsewhere", url=server.url)
        if (self.command, path) == ("POST", "/name"):
            return self.name()
        if (self.command, path) == ("GET", "/"):
            values = {"args": server.args, "examples": server.examples, "most": MAX_UPLOAD}
            return render("serve.html", ".", server.language, **values), 200
        example = {f"/example/{i}": Path(file) for i, file in enumerate(server.examples)}.get(path)
        known = self.command == "GET" and example and example.is_file()
        return (example, 200) if known else ({"error": "404"}, 404)

    def is_ours(self):
        """Whether Host is this server, and the request comes from its page or from no page at all."""
        hosts, port = self.headers.get_all("Host", []), self.server.server_address[1]
        names = "localhost", "127.0.0.1", "::1", self.server.args.host, socket.gethostname()
        names = {f"[{name}]" if ":" in name else name.lower() for name in (*names, self.connection.getsockname()[0])}
        own = {f"{name}:{port}" for name in names} | (names if port == 80 else set())
        origin, site = self.headers.get("Origin"), self.headers.get("Sec-Fetch-Site", "none")
        link = self.headers.get("Sec-Fetch-Mode") == "navigate" and self.command == "GET"  # a link to the page
        known = len(hosts) == 1 and hosts[0].lower() in own
        return known and origin in (None, f"http://{hosts[0]}") and (site in ("none", "same-origin") or link)

    def name(self):
        """As answer(), for a request that sends the bytes of a picture file."""
        lengths = self.headers.get_all("Content-Length", [])
        if len(lengths) != 1 or not re.fullmatch("[0-9]+", lengths[0]) or "Transfer-Encoding" in self.headers:
            return self.error(400, "serve_length")
        if len(lengths[0]) > 18 or int(lengths[0]) > MAX_UPLOAD:
            return self.error(413, "serve_too_large", most=MAX_UPLOAD // 1_000_000)
        size = int(lengths[0])
        try:
            with self.server.room_for(size):
                self.expect(size)
                content = self.rfile.read(size)
                if len(content) < size:
                    return self.error(400, "serve_length")
                self.server.deadlines[self.connection] = math.inf
                with self.server.turn_of(content):
                    return self.named(content)
        except Busy:
            return self.error(503, "serve_busy", seconds=READ_S)

    def named(self, content):
        """As answer(), for the bytes of a picture file, when it is their turn."""
        started, scorer = time.perf_counter(), self.server.scorer
        try:
            picture = load_picture(content)
            with self.server.model_lock:
                log_p = scorer.score(self.server.model, scorer.collate([picture]))
            return self.described(picture, log_p, started), 200
        except PictureError as error:
            return self.error(400, "serve_bad", reason=self.server.texts.reason(str(error)))
        except UserError as error:
            return self.error(500, "serve_failed", reason=error)
        except Exception as error:  # whatever fails for this picture may work for the next one
            traceback.print_exc()
            return self.error(500, "serve_failed", reason=f"{type(error).__name__}: {error}")

    def error(self, status, key, **values):
        """As answer(): a sentence of texts.json as plain text."""
        return {"error": self.server.texts(key, **values).unescape()}, status

    def described(self, picture, log_p, started):
        """The answer about a picture, as a dict."""
        [mass], [row] = probabilities(log_p)
        seconds, (width, height), texts = time.perf_counter() - started, picture.size, self.server.texts
        about = "serve_took_low" if mass < LOW_MASS else "serve_took"
        ranked = sorted(zip(self.server.scorer.labels, row, strict=True), key=lambda pair: -pair[1])
        best = ranked[0][0] if ranked[0][1] >= self.server.args.min_probability else "unsure"
        return {
            "prediction": best, "name": texts.label(best),
            "probabilities": [
                {"label": label, "name": texts.label(label), "probability": p, "shown": show(p, "sure")}
                for label, p in ranked
            ],
            "labels_mass": mass, "seconds": seconds, "width": width, "height": height,
            "about": texts(about, width=width, height=height, seconds=show(seconds, "ratio")),
            "picture": data_uri(picture, SHOWN, 85),
        }  # fmt: skip

    def expect(self, size):
        """From now on the other side has READ_S, and the time that `size` bytes take, until the connection is cut."""
        self.server.deadlines[self.connection] = time.monotonic() + READ_S + size / SLOWEST

    def reply(self, body, status):
        """Send an answer(), and end the connection."""
        kind = {dict: "application/json", str: "text/html; charset=utf-8"}.get(type(body), "application/octet-stream")
        text = json.dumps(body, ensure_ascii=False) if isinstance(body, dict) else body
        with open(body, "rb") if isinstance(body, Path) else io.BytesIO(text.encode(errors="backslashreplace")) as file:
            size = file.seek(0, os.SEEK_END)
            self.send_response(status)
            again = {"Retry-After": READ_S} if status == 503 else {}
            for key, value in (HEADERS | again | {"Content-Type": kind, "Content-Length": size}).items():
                self.send_header(key, value)
            self.end_headers()
            self.expect(size)
            file.seek(0)
            shutil.copyfileobj(file, self.wfile)
        # What is still being sent is read and dropped: a connection with unread bytes is reset, and the answer lost.
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
        self.expect(MAX_UPLOAD)
        while self.rfile.read1(1 << 16):
            pass

    def send_error(self, code, message=None, explain=None):
        """The answer to what is no request, in the form of all other answers."""
        self.reply({"error": f"{int(code)}: {message or code}"}, code)

    def log_message(self, format, *values):
        """No line for each request."""


def main():
    parser = settings.parser(__doc__.splitlines()[0], (*settings.TASK_FIELDS, "input_dir", "language"))
    add = parser.add_argument
    add("paths", nargs="*", metavar="PATH", help="pictures to try on the page (default: <input_dir>/test_data)")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: other machines may ask, too")
    add("--port", type=int, default=7860, help="port to listen on; 0: any free one")
    add("--min_probability", type=float, default=0.0, help="0 to 1; below it the answer is `unsure`")
    add_inference_flags(parser, batches=False)
    args = parser.parse_args()
    require_checkpoint(args.model_name_or_path)
    config = settings_for(settings.config_from(args), args.model_name_or_path)
    paths = args.paths or [os.path.join(config.input_dir, "test_data")]
    examples = [picture for path in paths if os.path.exists(path) for picture in list_pictures(path)]
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    try:  # before the model is loaded, which takes long
        listening = socket.create_server((args.host, args.port), family=family)
    except (OSError, OverflowError) as error:
        asked = f"--host {args.host} --port {args.port}"
        raise UserError(f"{asked}: found {error}; expected a free address; name another --port") from None
    from accelerate import PartialState

    on_cpu, dtype = choose_arithmetic(args.use_cpu, args.dtype)
    PartialState(cpu=on_cpu)  # the first call decides where this process computes
    server = Server(listening, *load_scorer(args.model_name_or_path, config, dtype), args, config.language, examples)
    # It ends at once, even while a thread computes and in a container: no file is open.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(0))
    print(f"{server.url}  (Ctrl-C ends it)", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    run(main)
