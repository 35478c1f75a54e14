"""Pages fit a phone: the report of a small stream, of a long one, and a pack; and they print."""

import json
import runpy
import shutil
from pathlib import Path

import pytest

from pipelines.benchmarks.page import benchmark_page
from pipelines.report.page import render
from tests.browser.pages import check_shown

ROOT = Path(__file__).parents[1]
SAMPLES = runpy.run_path(str(ROOT / "unit" / "report_samples.py"))
pytestmark = pytest.mark.skipif(shutil.which("chromium") is None,
                                reason="Debian's chromium is not installed")


def report(tasks):
    return render(SAMPLES["sample"](tasks))


def pack():
    recorded = json.loads((ROOT / "golden" / "pack-noisy-cifar-cpu.json").read_text())
    return benchmark_page(recorded)


@pytest.fixture(scope="module", params=["report", "long", "pack"])
def page(request, tmp_path_factory):
    made = {"report": lambda: report(12), "long": lambda: report(200), "pack": pack}[request.param]
    path = tmp_path_factory.mktemp("pages") / "page.html"
    path.write_text(made(), encoding="utf-8")
    return path


def test_nothing_is_cut_on_a_phone_a_tablet_and_a_desktop(browser, page):
    for width in (390, 768, 1280):
        check_shown(browser, page, browser.show(page, width, "light"), width)
        svgs = browser.value("[...document.querySelectorAll('svg')].map(s => "
                             "s.getBoundingClientRect().width).filter(w => w > 0)")
        assert min(svgs) >= 250, "every chart is large enough to be looked at"


def test_on_paper_nothing_is_cut_and_what_is_for_the_desk_stays_away(browser, page):
    browser.show(page, 688, "dark")  # A4 without its margins
    browser.call("Emulation.setEmulatedMedia", media="print")
    try:
        assert browser.value("document.documentElement.scrollWidth") <= 688
        shown = browser.value("document.body.innerText")
        assert "partialhn predict" not in shown
        assert browser.value("getComputedStyle(document.body).backgroundColor") == (
            "rgb(255, 255, 255)"), "paper is white whatever the screen prefers"
    finally:
        browser.call("Emulation.setEmulatedMedia", media="")
