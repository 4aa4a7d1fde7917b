"""Chromium without a window, driven by its DevTools protocol with the standard library alone.

The protocol goes over two pipes (--remote-debugging-pipe), so no port is opened. A browser is not
among the requirements: `find_chromium` says whether there is one.
"""

import base64
import io
import json
import os
import select
import shutil
import subprocess
import sys
import time

import numpy as np
from PIL import Image

PROGRAMS = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]
FLAGS = [
    "--headless",
    "--no-sandbox",  # which root has not
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--force-prefers-reduced-motion",
    "--remote-debugging-pipe",
]
# The browser reads commands from file 3 and writes answers to file 4.
START = 'exec "$0" "$@" 3<&0 4>&1 0</dev/null 1>/dev/null'
SECONDS = 20
KEYS = {
    "ArrowLeft": 37,
    "ArrowUp": 38,
    "ArrowRight": 39,
    "ArrowDown": 40,
    "Escape": 27,
    "Tab": 9,
    "Enter": 13,
}


def find_chromium():
    """The path of a Chromium or Chrome, or None. Windows has no files 3 and 4 to pass on."""
    if sys.platform == "win32":
        return None
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


class Page:
    """A browser with one page. `problems` are what its console said, errors of scripts included."""

    def __init__(self, program, profile):
        self.process = subprocess.Popen(
            ["sh", "-c", START, program, f"--user-data-dir={profile}", *FLAGS, "about:blank"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.unread, self.count, self.session = b"", 0, None
        self.problems, self.loads = [], 0
        target = self.command("Target.createTarget", url="about:blank")["targetId"]
        attached = self.command("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.command(f"{domain}.enable")

    def close(self):
        self.session = None
        self.command("Browser.close")
        self.process.stdin.close()
        self.process.wait(SECONDS)
        self.process.stdout.close()

    # ---- The protocol ----------------------------------------------------------------------------

    def command(self, method, **parameters):
        """Send a command and return its result."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        self.process.stdin.write(json.dumps(message).encode() + b"\0")
        self.process.stdin.flush()
        while (answer := self.read_message()).get("id") != self.count:
            pass
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def read_message(self):
        """The next message of the browser, of which events are noted."""
        while b"\0" not in self.unread:
            ready, _, _ = select.select([self.process.stdout], [], [], SECONDS)
            assert ready, "the browser is silent"
            part = os.read(self.process.stdout.fileno(), 1 << 20)
            assert part, "the browser has ended"
            self.unread += part
        text, _, self.unread = self.unread.partition(b"\0")
        message = json.loads(text)
        method, facts = message.get("method"), message.get("params")
        if method == "Page.loadEventFired":
            self.loads += 1
        elif method == "Runtime.exceptionThrown":
            self.problems.append(facts["exceptionDetails"])
        elif method == "Runtime.consoleAPICalled":
            self.problems.append(facts["args"])
        elif method == "Log.entryAdded":
            self.problems.append(facts["entry"])
        return message

    # ---- What a visitor does ---------------------------------------------------------------------

    def open(self, path, address=""):
        """Load a file afresh, with that address after its #."""
        loads = self.loads
        # With a query of its own, as another address alone would load nothing.
        url = f"{path.as_uri()}?{loads}" + (f"#{address}" if address else "")
        self.command("Page.navigate", url=url)
        while self.loads == loads:
            self.read_message()
        self.command("Page.resetNavigationHistory")  # which holds 50 steps at most

    def click(self, element):
        """Click on the middle of what a JavaScript expression or a selector names."""
        self.point(element)
        for kind in ("mousePressed", "mouseReleased"):
            self.mouse(kind, button="left", clickCount=1)
        self.settle()

    def point(self, element):
        """Move the pointer to the middle of what a JavaScript expression or a selector names."""
        self.eval(f"{expression(element)}.scrollIntoView({{ block: 'center' }})")
        left, top, width, height = self.box(element)
        self.pointer = (left + width / 2, top + height / 2)
        self.mouse("mouseMoved")
        self.settle()

    def mouse(self, kind, **facts):
        x, y = self.pointer
        self.command("Input.dispatchMouseEvent", type=kind, x=x, y=y, **facts)

    def press(self, key):
        self.hold(key)
        self.release(key)

    def hold(self, key, repeats=False):
        text = {"text": "\r"} if key == "Enter" else {}
        self.key("keyDown", key, autoRepeat=repeats, **text)

    def release(self, key):
        self.key("keyUp", key)

    def key(self, kind, key, **facts):
        names = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        self.command("Input.dispatchKeyEvent", type=kind, **names, **facts)
        self.settle()

    def choose(self, element, value):
        """Set the value of a select or a slider as a visitor does, who is told of each change."""
        self.eval(
            f"((it) => {{ it.value = {json.dumps(value)};"
            "for (const kind of ['input', 'change'])"
            f"it.dispatchEvent(new Event(kind, {{ bubbles: true }})); }})({expression(element)})"
        )
        self.settle()

    # ---- What a visitor sees ---------------------------------------------------------------------

    def eval(self, code):
        """The value of a JavaScript expression; a promise is awaited."""
        found = self.command(
            "Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, (code, found["exceptionDetails"])
        return found["result"].get("value")

    def settle(self):
        """Wait until the page knows of what was done: a change of the address is told later."""
        self.eval("new Promise((done) => setTimeout(() => setTimeout(done, 5)))")

    def wait(self, condition):
        """Wait until a JavaScript expression is true."""
        start = time.monotonic()
        while not self.eval(condition):
            assert time.monotonic() < start + SECONDS, condition
            time.sleep(0.01)

    def text(self, element):
        """The text of an element, without parts of it that are hidden."""
        return self.eval(f"{expression(element)}.innerText")

    def texts(self, selector):
        """The texts of all elements that a selector finds."""
        return self.each(selector, "innerText")

    def each(self, selector, what):
        """A property of all elements that a selector finds."""
        return self.eval(f"{all_of(selector)}.map((it) => it.{what})")

    def box(self, element):
        """Left, top, width and height within the window, in CSS pixels."""
        (box,) = self.boxes(f"[{expression(element)}]")
        return box

    def boxes(self, elements):
        """The box of each element of a selector or of a JavaScript array."""
        return self.eval(
            f"{all_of(elements)}.map((it) => it.getBoundingClientRect())"
            ".map(({ x, y, width, height }) => [x, y, width, height])"
        )

    def colours(self, elements, down=0.5, across=0.5):
        """The colour of each element as it is seen, in its middle or at shares of its sides."""
        self.settle()
        self.eval(f"{all_of(elements)}[0]?.scrollIntoView({{ block: 'center' }})")
        boxes = np.reshape(self.boxes(elements), (-1, 4))
        if not len(boxes):
            return []
        scrolled = np.array(self.eval("[scrollX, scrollY]"))
        places = (boxes[:, :2] + boxes[:, 2:] * (across, down)).astype(int)
        left, top = places.min(0)
        picture = self.picture(scrolled + np.array([left, top]), places.max(0) + 1 - places.min(0))
        return [tuple(picture[y - top, x - left].tolist()) for x, y in places]

    def picture(self, start, size):
        """The (h, w, 3) uint8 pixels of a part of the page, which must be in sight."""
        clip = dict(zip(("x", "y", "width", "height"), map(int, [*start, *size]), strict=True))
        shot = self.command("Page.captureScreenshot", clip=clip | {"scale": 1})["data"]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(shot))).convert("RGB"))

    def resize(self, width, height, dark=False):
        """Give the window a size, and the visitor's wish for a light or a dark page."""
        self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", features=[scheme])


def expression(element):
    """A selector as the JavaScript expression of its first element; other text stays as it is."""
    if element.startswith(("document", "$(")):
        return element
    return f"document.querySelector({json.dumps(element)})"


def all_of(elements):
    """A selector as the JavaScript array of its elements; an array stays as it is."""
    if elements.startswith("["):
        return elements
    return f"[...document.querySelectorAll({json.dumps(elements)})]"
