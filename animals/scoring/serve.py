"""A local page that names pictures: `python test.py --serve`. Werkzeug, which TensorBoard brings, one lock, no files.

    curl --data-binary @cat.jpg http://127.0.0.1:7860/name

answers JSON: prediction, probabilities (the most probable label first), seconds, width, height; or error, a sentence.
A page of another origin gets nothing: Host must be this server's address (so no foreign name can be rebound to it),
and what a browser says of the request's origin must be this page.
"""

import ipaddress
import json
import os
import signal
import socket
import threading
import time

from animals.command import UserError
from animals.pictures.read import PictureError, load_picture
from animals.scoring.page import Texts, data_uri, render, show
from animals.scoring.scorer import probabilities

MAX_UPLOAD = 64_000_000  # bytes; a 50-megapixel JPEG of a phone has 25,000,000
EXAMPLES = 12  # pictures on the page to try
SHOWN = 800  # pixels, longest side of the picture that comes back: what the model saw, upright
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
    """A listening socket. Raises UserError if the address cannot be had. Before the model is loaded: it takes long."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--host {host} --port {port}: found {error}; expected a free address of this machine; name another --port"
        ) from None


class Server:
    """Answers with `scorer` and `model` what test.py's CSV says, one picture at a time."""

    def __init__(self, scorer, model, name, examples, min_probability, language, host):
        self.scorer, self.model, self.name, self.host = scorer, model, name, host
        self.examples, self.min_probability, self.language = examples[:EXAMPLES], min_probability, language
        self.texts, self.lock = Texts(language), threading.Lock()

    def __call__(self, environ, start_response):
        from werkzeug import Request, Response

        request = Request(environ)
        request.max_content_length = MAX_UPLOAD
        body, status, kind = self.answer(request)
        if kind is None:
            body, kind = json.dumps(body, ensure_ascii=False), "application/json"
        return Response(body, status, HEADERS, mimetype=kind)(environ, start_response)

    def answer(self, request):
        """(body, status, MIME type; None for JSON) of a request."""
        from werkzeug.exceptions import RequestEntityTooLarge

        if not self.is_ours(request):
            return {"error": self.texts("serve_elsewhere", url=f"http://{self.host}")}, 403, None
        if (request.method, request.path) == ("GET", "/"):
            return self.page(), 200, "text/html"
        if request.method == "GET" and request.path.startswith("/example/"):
            number = request.path.removeprefix("/example/")
            if number.isdecimal() and int(number) < len(self.examples):
                with open(self.examples[int(number)], "rb") as file:
                    return file.read(), 200, "application/octet-stream"
        if (request.method, request.path) == ("POST", "/name"):
            try:
                return self.named(request.get_data())
            except RequestEntityTooLarge:
                return {"error": self.texts("serve_too_large", most=MAX_UPLOAD // 1_000_000)}, 413, None
        return {"error": "404"}, 404, None

    def is_ours(self, request):
        """Whether Host is an address of this server, and the request comes from its page or from no page at all."""
        host = request.headers.get("Host", "")
        name = host.rsplit(":", 1)[0].strip("[]") if not host.endswith("]") else host.strip("[]")
        try:
            known = bool(ipaddress.ip_address(name))  # an address cannot be rebound
        except ValueError:
            known = name in ("localhost", self.host, socket.gethostname())
        origin, site = request.headers.get("Origin"), request.headers.get("Sec-Fetch-Site", "none")
        top = request.headers.get("Sec-Fetch-Mode") == "navigate" and request.method == "GET"  # a link to the page
        return known and origin in (None, f"http://{host}") and (site in ("none", "same-origin") or top)

    def page(self):
        texts = {key: self.texts(f"serve_{key}") for key in ("working", "gone", "no_camera")}
        texts["too_large"] = self.texts("serve_too_large", most=MAX_UPLOAD // 1_000_000)
        return render(
            "serve.html", ".", self.language, model=self.name, texts=texts, most=MAX_UPLOAD,
            examples=self.examples, min_probability=self.min_probability,
        )  # fmt: skip

    def named(self, content):
        """The answer to a file's content."""
        started = time.perf_counter()
        try:
            with self.lock:  # also around the decoding: many large pictures at once would not fit
                picture = load_picture(content)
                log_p = self.scorer.score(self.model, self.scorer.collate([picture]))
        except PictureError as error:
            return {"error": self.texts("serve_bad", reason=self.texts.reason(str(error)))}, 400, None
        except Exception as error:  # whatever the model dies of, the next picture may do
            return {"error": self.texts("serve_failed", reason=f"{type(error).__name__}: {error}")}, 500, None
        [row] = probabilities(log_p)
        seconds, (width, height) = time.perf_counter() - started, picture.size
        ranked = sorted(zip(self.scorer.labels, row, strict=True), key=lambda one: -one[1])
        said = ranked[0][0] if ranked[0][1] >= self.min_probability else "unsure"
        took = self.texts("serve_took", width=width, height=height, seconds=show(seconds, "ratio"))
        return {
            "prediction": said,
            "name": self.texts.label(said),
            "probabilities": [
                {"label": label, "name": self.texts.label(label), "probability": p, "shown": show(p, "sure")}
                for label, p in ranked
            ],
            "seconds": seconds,
            "width": width,
            "height": height,
            "about": took,
            "picture": data_uri(picture, SHOWN, 85),
        }, 200, None  # fmt: skip


def serve(app, listening):
    """Until Ctrl-C or SIGTERM. app: a Server."""
    import logging

    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # not a line for each picture
    host, port = listening.getsockname()[:2]
    server = make_server(host, port, app, threaded=True, fd=listening.fileno())
    # At once, whatever a thread is computing; nothing is open. As process 1 of a container it would else be ignored.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    shown = f"[{host}]" if ":" in host else host
    print(f"http://{shown}:{port}/  (Ctrl-C ends it)", flush=True)
    server.serve_forever()
