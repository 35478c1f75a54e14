"""A real browser: Chromium without a window, driven over its debugging pipe.

No driver package is needed, and nothing is put into the pages.
"""

import json
import os
import select
import shutil
import subprocess
import time

import pytest

CHROMIUM = shutil.which("chromium")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--remote-debugging-pipe")


class Browser:
    """As much of the DevTools protocol as the test needs: JSON messages ended by a zero byte."""

    def __init__(self, profile):
        command_read, self.commands = os.pipe()
        self.replies, reply_write = os.pipe()
        # Chromium reads its file descriptor 3 and writes 4; bash puts the pipes there.
        launch = (f'exec 103<&{command_read} 104>&{reply_write}; '
                  'exec "$0" "$@" 3<&103 4>&104 103<&- 104>&-')
        self.process = subprocess.Popen(
            ["bash", "-c", launch, CHROMIUM, *FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(command_read, reply_write), stderr=subprocess.DEVNULL)
        os.close(command_read)
        os.close(reply_write)
        self.number, self.waiting, self.events = 0, b"", []
        target = self.call("Target.createTarget", url="about:blank", session=None)["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True,
                                 session=None)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def receive(self, deadline):
        while b"\0" not in self.waiting:
            ready, _, _ = select.select([self.replies], [], [], max(0, deadline - time.time()))
            assert ready, "chromium did not answer in time"
            self.waiting += os.read(self.replies, 1 << 20)
        message, self.waiting = self.waiting.split(b"\0", 1)
        return json.loads(message)

    def call(self, method, session="", **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if session == "":
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        deadline = time.time() + 60
        while True:
            reply = self.receive(deadline)
            if reply.get("id") == self.number:
                assert "error" not in reply, reply
                return reply["result"]
            self.events.append(reply)

    def wait_for(self, event):
        deadline = time.time() + 60
        while not any(seen.get("method") == event for seen in self.events):
            self.events.append(self.receive(deadline))

    def show(self, path, width, scheme):
        """Opens a page and returns the messages that arrived while it loaded."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900,
                  deviceScaleFactor=1, mobile=width < 700)
        self.call("Emulation.setEmulatedMedia",
                  features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        self.wait_for("Page.loadEventFired")
        return list(self.events)

    def value(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"]["value"]

    def close(self):
        self.process.terminate()
        self.process.wait(timeout=30)
        os.close(self.commands)
        os.close(self.replies)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()
