"""The report in a real browser: Chromium without a window, on a phone and on a desktop.

Skipped where Debian's chromium is not installed. The browser is driven over its debugging pipe,
so that no driver package is needed and the page itself stays free of scripts.
"""

import json
import os
import runpy
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from pipelines.report import render

SAMPLES = runpy.run_path(str(Path(__file__).parents[1] / "unit" / "report_samples.py"))
CHROMIUM = shutil.which("chromium")
PAGES = {"5 tasks": SAMPLES["sample"](5), "20 tasks": SAMPLES["sample"](20),
         "100 tasks": SAMPLES["sample"](100), "1 task": SAMPLES["sample"](1),
         "forgetful": SAMPLES["forgetful"](8), "minimal": SAMPLES["minimal"](),
         "hostile": SAMPLES["hostile"]()}
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--remote-debugging-pipe")
pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed")]

# Rendered size and contrast (WCAG 2) of every number in the heat map.
CELLS = """
(() => {
  const channels = css => css.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const light = css => channels(css).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, k) => sum + v * [0.2126, 0.7152, 0.0722][k], 0);
  return [...document.querySelectorAll('#matrix text.cell')].map(text => {
    const cell = text.parentNode.querySelector('rect');
    const [a, b] = [light(getComputedStyle(text).fill), light(getComputedStyle(cell).fill)];
    const [words, box] = [text.getBoundingClientRect(), cell.getBoundingClientRect()];
    const scale = box.width / cell.width.baseVal.value;
    return {contrast: (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05),
            pixels: parseFloat(getComputedStyle(text).fontSize) * scale,
            inside: words.left >= box.left && words.right <= box.right};
  });
})()
"""


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


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for name, result in PAGES.items():
        (folder / f"{name}.html").write_text(render(result), encoding="utf-8")
    return folder


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", PAGES)
def test_page_shows_well(browser, pages, name, width, scheme):
    page = pages / f"{name}.html"
    events = browser.show(page, width, scheme)
    browser.call("Runtime.evaluate",
                 expression="document.querySelectorAll('details').forEach(d => d.open = true)")

    wide = browser.value("[document.documentElement.scrollWidth, window.innerWidth]")
    assert wide[0] <= wide[1] == width

    trouble = [event for event in events if event.get("method") in (
        "Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded",
        "Page.javascriptDialogOpening")]
    assert trouble == []
    asked = {event["params"]["request"]["url"] for event in events
             if event.get("method") == "Network.requestWillBeSent"}
    assert {url for url in asked if not url.startswith("data:")} == {page.as_uri()}

    cells = browser.value(CELLS)
    n_tasks = len(PAGES[name]["accuracy_matrix"])
    assert len(cells) == (n_tasks * (n_tasks + 1) // 2 if 1 < n_tasks <= 25 else 0)
    for cell in cells:
        assert cell["contrast"] >= 4.5
        assert cell["pixels"] >= 9.5
        assert cell["inside"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_of_the_page_has_contrast(browser, pages, scheme):
    browser.show(pages / "forgetful.html", 1280, scheme)
    weak = browser.value("""
(() => {
  const channels = css => css.match(/[\\d.]+/g).map(Number);
  const light = css => channels(css).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, k) => sum + v * [0.2126, 0.7152, 0.0722][k], 0);
  const ground = node => {
    for (; node; node = node.parentElement) {
      const css = getComputedStyle(node).backgroundColor;
      if (channels(css)[3] !== 0) return css;
    }
    return 'rgb(255, 255, 255)';
  };
  return [...document.querySelectorAll('p, h1, h2, h3, li, dt, dd, td, th, figcaption, '
      + 'summary, small, code, svg text:not(.cell)')].map(node => {
    const style = getComputedStyle(node);
    const a = light(node.closest('svg') ? style.fill : style.color), b = light(ground(node));
    return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), node.textContent];
  }).filter(([contrast]) => contrast < 4.5);
})()
""")
    assert weak == []
