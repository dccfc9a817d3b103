"""A local page that names pictures: drop one, and see the probability of each label.

    python scripts/serve.py                             # then open http://127.0.0.1:7860/
    python scripts/serve.py some/folder one.jpg         # with these pictures to try, not those of <input_dir>/test_data
    curl --data-binary @cat.jpg http://127.0.0.1:7860/name

The last line prints JSON: prediction, probabilities (the most probable label first), seconds, width and height; or
error, a sentence. The answers are those of test.py. Nothing is written. Pages of other origins are refused.
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
from animals.scoring.scorer import add_inference_flags, load_scorer, probabilities

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


class Server:
    """The WSGI application around a scorer and its model. args: what main() parsed. examples: paths of pictures."""

    def __init__(self, scorer, model, args, language, examples):
        self.scorer, self.model, self.args, self.examples = scorer, model, args, examples[:EXAMPLES]
        self.language, self.texts, self.lock = language, Texts(language), threading.Lock()

    def __call__(self, environ, start_response):
        request = Request(environ)
        request.max_content_length = MAX_UPLOAD
        body, status = self.answer(request)
        kind = {dict: "application/json", str: "text/html", bytes: "application/octet-stream"}[type(body)]
        content = json.dumps(body, ensure_ascii=False) if isinstance(body, dict) else body
        return Response(content, status, HEADERS, mimetype=kind)(environ, start_response)

    def answer(self, request):
        """(a dict for JSON, the page or the bytes of a file; the HTTP status) for a request."""
        if not self.is_ours(request):
            return {"error": self.texts("serve_elsewhere", url=f"http://{self.args.host}")}, 403
        match request.method, request.path.split("/")[1:]:
            case "GET", [""]:
                values = {"args": self.args, "examples": self.examples, "most": MAX_UPLOAD}
                return render("serve.html", ".", self.language, **values), 200
            case "GET", ["example", number] if number.isdecimal() and int(number) < len(self.examples):
                return Path(self.examples[int(number)]).read_bytes(), 200
            case "POST", ["name"]:
                return self.name(request)
        return {"error": "404"}, 404

    def is_ours(self, request):
        """Whether Host is an address of this server, and the request comes from its page or from no page at all."""
        host = request.headers.get("Host", "")
        name = host.rsplit(":", 1)[0].strip("[]") if not host.endswith("]") else host.strip("[]")
        try:
            known = bool(ipaddress.ip_address(name))  # a number leads nowhere else; a name may be bound to any machine
        except ValueError:
            known = name in ("localhost", self.args.host, socket.gethostname())
        origin, site = request.headers.get("Origin"), request.headers.get("Sec-Fetch-Site", "none")
        link = request.headers.get("Sec-Fetch-Mode") == "navigate" and request.method == "GET"  # a link to the page
        return known and origin in (None, f"http://{host}") and (site in ("none", "same-origin") or link)

    def name(self, request):
        """As answer(), for a request that sends the bytes of a picture file."""
        try:
            content, started = request.get_data(), time.perf_counter()
            with self.lock:  # the decoding too: many large pictures at once would not fit into memory
                picture = load_picture(content)
                log_p = self.scorer.score(self.model, self.scorer.collate([picture]))
        except RequestEntityTooLarge:
            return {"error": self.texts("serve_too_large", most=MAX_UPLOAD // 1_000_000)}, 413
        except PictureError as error:
            return {"error": self.texts("serve_bad", reason=self.texts.reason(str(error)))}, 400
        except Exception as error:  # whatever fails for this picture may work for the next one
            return {"error": self.texts("serve_failed", reason=f"{type(error).__name__}: {error}")}, 500
        [row] = probabilities(log_p)
        seconds, (width, height) = time.perf_counter() - started, picture.size
        ranked = sorted(zip(self.scorer.labels, row, strict=True), key=lambda pair: -pair[1])
        best = ranked[0][0] if ranked[0][1] >= self.args.min_probability else "unsure"
        return {
            "prediction": best, "name": self.texts.label(best),
            "probabilities": [
                {"label": label, "name": self.texts.label(label), "probability": p, "shown": show(p, "sure")}
                for label, p in ranked
            ],
            "seconds": seconds, "width": width, "height": height,
            "about": self.texts("serve_took", width=width, height=height, seconds=show(seconds, "ratio")),
            "picture": data_uri(picture, SHOWN, 85),
        }, 200  # fmt: skip


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
    application = Server(*load_scorer(args.model_name_or_path, config, dtype), args, config.language, examples)
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # no line for each request
    host, port = listening.getsockname()[:2]
    server = make_server(host, port, application, threaded=True, fd=listening.fileno())
    # It ends at once, even while a thread computes and in a container: no file is open.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    print(f"http://{f'[{host}]' if ':' in host else host}:{port}/  (Ctrl-C ends it)", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    run(main)
