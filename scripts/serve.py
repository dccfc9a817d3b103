"""A local page that names pictures: drop one, and see the probability of each label.

    python scripts/serve.py                             # then open http://127.0.0.1:7860/
    python scripts/serve.py some/folder one.jpg         # with these pictures to try, not those of <input_dir>/test_data
    curl --data-binary @cat.jpg http://127.0.0.1:7860/name

The last line prints JSON: prediction, probabilities (the most probable label first), seconds, width and height; or
error, a sentence. The answers are those of test.py. Nothing is written. Pages of other origins are refused: the Host
header must be an address of this server, and the origin that a browser names must be this page.
"""

import ipaddress
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

from werkzeug import Request, Response
from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.serving import make_server

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import config as settings
from animals.checkpoint.check import require_checkpoint
from animals.checkpoint.task import settings_for
from animals.command import UserError, run
from animals.pictures.read import PictureError, list_pictures, load_picture
from animals.ranks import choose_arithmetic
from animals.scoring.page import Texts, data_uri, render, show
from animals.scoring.scorer import load_scorer, probabilities

MAX_UPLOAD = 64_000_000  # bytes; a 50-megapixel JPEG of a phone has 25,000,000
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
}


def listen(host, port):
    """A listening socket, asked for before the model is loaded, which takes long. Raises UserError if it is refused."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--host {host} --port {port}: found {error}; expected a free address of this machine; name another --port"
        ) from None


class Server:
    """A WSGI application around a scorer and its model. `arguments` are those of main()."""

    def __init__(self, scorer, model, arguments, language, examples):
        self.scorer, self.model, self.arguments = scorer, model, arguments
        self.language, self.texts, self.examples = language, Texts(language), examples[:EXAMPLES]
        self.lock = threading.Lock()

    def __call__(self, environ, start_response):
        request = Request(environ)
        request.max_content_length = MAX_UPLOAD
        body, status = self.answer(request)
        kind = {dict: "application/json", str: "text/html", bytes: "application/octet-stream"}[type(body)]
        content = json.dumps(body, ensure_ascii=False) if isinstance(body, dict) else body
        return Response(content, status, HEADERS, mimetype=kind)(environ, start_response)

    def answer(self, request):
        """(JSON's dict, a page or a file's bytes; status) for a request."""
        if not self.is_ours(request):
            return {"error": self.texts("serve_elsewhere", url=f"http://{self.arguments.host}")}, 403
        if (request.method, request.path) == ("GET", "/"):
            return self.page(), 200
        if request.method == "GET" and request.path.startswith("/example/"):
            number = request.path.removeprefix("/example/")
            if number.isdecimal() and int(number) < len(self.examples):
                return Path(self.examples[int(number)]).read_bytes(), 200
        if (request.method, request.path) == ("POST", "/name"):
            try:
                return self.name(request.get_data())
            except RequestEntityTooLarge:
                return {"error": self.texts("serve_too_large", most=MAX_UPLOAD // 1_000_000)}, 413
        return {"error": "404"}, 404

    def is_ours(self, request):
        """Whether Host is an address of this server, and the request comes from its page or from no page at all."""
        host = request.headers.get("Host", "")
        name = host.rsplit(":", 1)[0].strip("[]") if not host.endswith("]") else host.strip("[]")
        try:
            known = bool(ipaddress.ip_address(name))  # no page can bind an address to another machine
        except ValueError:
            known = name in ("localhost", self.arguments.host, socket.gethostname())
        origin, site = request.headers.get("Origin"), request.headers.get("Sec-Fetch-Site", "none")
        link = request.headers.get("Sec-Fetch-Mode") == "navigate" and request.method == "GET"  # a link to the page
        return known and origin in (None, f"http://{host}") and (site in ("none", "same-origin") or link)

    def page(self):
        """The HTML of the page."""
        texts = {key: self.texts(f"serve_{key}") for key in ("working", "gone", "no_camera")}
        texts["too_large"] = self.texts("serve_too_large", most=MAX_UPLOAD // 1_000_000)
        args = self.arguments
        values = {"model": args.model_name_or_path, "min_probability": args.min_probability, "examples": self.examples}
        return render("serve.html", ".", self.language, texts=texts, most=MAX_UPLOAD, **values)

    def name(self, content):
        """As answer(), for the bytes of a picture file."""
        started = time.perf_counter()
        try:
            with self.lock:  # the decoding too: many large pictures at once would not fit into memory
                picture = load_picture(content)
                log_p = self.scorer.score(self.model, self.scorer.collate([picture]))
        except PictureError as error:
            return {"error": self.texts("serve_bad", reason=self.texts.reason(str(error)))}, 400
        except Exception as error:  # whatever fails for this picture may work for the next one
            return {"error": self.texts("serve_failed", reason=f"{type(error).__name__}: {error}")}, 500
        [row] = probabilities(log_p)
        seconds, (width, height) = time.perf_counter() - started, picture.size
        ranked = sorted(zip(self.scorer.labels, row, strict=True), key=lambda pair: -pair[1])
        best = ranked[0][0] if ranked[0][1] >= self.arguments.min_probability else "unsure"
        return {
            "prediction": best,
            "name": self.texts.label(best),
            "probabilities": [
                {"label": label, "name": self.texts.label(label), "probability": p, "shown": show(p, "sure")}
                for label, p in ranked
            ],
            "seconds": seconds, "width": width, "height": height,
            "about": self.texts("serve_took", width=width, height=height, seconds=show(seconds, "ratio")),
            "picture": data_uri(picture, SHOWN, 85),
        }, 200  # fmt: skip


def serve(application, listening):
    """Serve the WSGI application on the listening socket until Ctrl-C or SIGTERM."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # no line for each request
    host, port = listening.getsockname()[:2]
    server = make_server(host, port, application, threaded=True, fd=listening.fileno())
    # It ends at once, even while a thread computes: no file is open. Process 1 of a container would ignore the default.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    shown = f"[{host}]" if ":" in host else host
    print(f"http://{shown}:{port}/  (Ctrl-C ends it)", flush=True)
    server.serve_forever()


def main():
    parser = settings.parser(__doc__.splitlines()[0], (*settings.TASK_FIELDS, "input_dir", "language"))
    parser.add_argument("paths", nargs="*", metavar="PATH", help="pictures to try (default: <input_dir>/test_data)")
    model = settings.TRAINING_DEFAULTS["output_dir"]
    parser.add_argument("--model_name_or_path", default=model, help="the checkpoint that answers")
    dtypes = ["bfloat16", "float16", "float32"]
    parser.add_argument("--dtype", default="bfloat16", choices=dtypes, help="of the weights on a GPU")
    parser.add_argument("--use_cpu", action="store_true", help="compute on the CPU although there is a GPU")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: for other machines too")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on; 0: any free one")
    parser.add_argument("--min_probability", type=float, default=0.0, help="0 to 1; below it the answer is `unsure`")
    args = parser.parse_args()
    require_checkpoint(args.model_name_or_path)
    config = settings_for(settings.config_from(args), args.model_name_or_path)
    if not 0 <= args.min_probability <= 1:
        raise UserError(f"--min_probability: found {args.min_probability}; expected a number from 0 to 1")
    paths = args.paths or [os.path.join(config.input_dir, "test_data")]
    examples = [picture for path in paths if os.path.exists(path) for picture in list_pictures(path)]
    listening = listen(args.host, args.port)
    from accelerate import PartialState

    on_cpu, dtype = choose_arithmetic(args.use_cpu, args.dtype)
    PartialState(cpu=on_cpu)  # the first call decides where this process computes
    scorer, model = load_scorer(args.model_name_or_path, config, dtype)
    serve(Server(scorer, model, args, config.language, examples), listening)


if __name__ == "__main__":
    run(main)
