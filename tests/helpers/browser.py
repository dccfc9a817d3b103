"""A real headless Chromium, driven over the DevTools protocol's pipe: nothing to install but Chromium itself.

    python tests/helpers/browser.py temp/demo/logs/validation/sft-llava-demo/report.html demo/report.png

saves the first screen of a page, 1280 x 800 pixels: this command makes the picture in the README.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-extensions",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",  # a camera that shows a test picture
    "--remote-debugging-pipe",
)  # fmt: skip


def find_chromium():
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """with Browser(profile_folder) as browser: one tab. `events` holds the requests and the errors of the page."""

    def __init__(self, profile):
        (read_commands, self.write), (self.read, write_answers) = os.pipe(), os.pipe()

        def connect():  # Chromium reads commands from file descriptor 3 and writes answers to 4
            commands, answers = (fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (read_commands, write_answers))
            os.dup2(commands, 3)  # the pipes' own numbers may be 3 and 4, hence the copies from 10 on
            os.dup2(answers, 4)

        command = [find_chromium(), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(command, preexec_fn=connect, close_fds=False, stderr=subprocess.DEVNULL)
        os.close(read_commands)
        os.close(write_answers)
        self.buffer, self.last, self.session, self.events = b"", 0, None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(20)
        os.close(self.write)
        os.close(self.read)

    def message(self, timeout):
        end = time.monotonic() + timeout
        while b"\0" not in self.buffer:
            if not select.select([self.read], [], [], max(0, end - time.monotonic()))[0]:
                raise TimeoutError("Chromium did not answer")
            part = os.read(self.read, 1 << 20)
            if not part:
                raise EOFError("Chromium ended")
            self.buffer += part
        line, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(line)
        if "method" in message:
            self.events.append((message["method"], message["params"]))
        return message

    def call(self, method, **params):
        self.last += 1
        command = {"id": self.last, "method": method, "params": params}
        if self.session:
            command["sessionId"] = self.session
        os.write(self.write, json.dumps(command).encode() + b"\0")
        while (message := self.message(60)).get("id") != self.last:
            pass
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']}")
        return message["result"]

    def open(self, url):
        self.events.clear()
        self.call("Page.navigate", url=url)
        while not any(method == "Page.loadEventFired" for method, _ in self.events):
            self.message(60)

    def js(self, expression):
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, expression, timeout=60):
        end = time.monotonic() + timeout
        while not (value := self.js(expression)):
            assert time.monotonic() < end, f"still not: {expression}"
            time.sleep(0.2)
        return value

    def view(self, width, height=900, dark=False):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = [
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce"},  # no smooth scrolling under the mouse
        ]
        self.call("Emulation.setEmulatedMedia", features=scheme)

    def click(self, x, y):
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press_enter(self):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key="Enter", windowsVirtualKeyCode=13, text="\r")

    def drop(self, path, x, y):
        """Drop a file from the desktop at this place."""
        data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def screenshot(self, path):
        Path(path).write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def requests(self):
        return [p["request"]["url"] for method, p in self.events if method == "Network.requestWillBeSent"]

    def complaints(self):
        logged = [p["entry"]["text"] for method, p in self.events if method == "Log.entryAdded"]
        thrown = [str(p) for method, p in self.events if method == "Runtime.exceptionThrown"]
        said = [p for method, p in self.events if method == "Runtime.consoleAPICalled"]
        return logged + thrown + [str(p["args"]) for p in said if p["type"] in ("error", "warning", "assert")]


if __name__ == "__main__":
    page, png = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder, Browser(folder) as browser:
        browser.view(1280, 800)
        browser.open(Path(page).resolve().as_uri())
        browser.screenshot(png)
