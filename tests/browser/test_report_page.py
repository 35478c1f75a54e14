"""The report in a real browser: Chromium without a window, on a phone and on a desktop.

Skipped where Debian's chromium is not installed.
"""

import runpy
import shutil
from pathlib import Path

import pytest

from pipelines.report.charts import NARROW, WITH_TEXT
from pipelines.report.page import render
from tests.browser.pages import check_shown, weak_texts

SAMPLES = runpy.run_path(str(Path(__file__).parents[1] / "unit" / "report_samples.py"))
CHROMIUM = shutil.which("chromium")
PAGES = {"5 tasks": SAMPLES["sample"](5), "20 tasks": SAMPLES["sample"](20),
         "100 tasks": SAMPLES["sample"](100), "1 task": SAMPLES["sample"](1),
         "forgetful": SAMPLES["forgetful"](8), "minimal": SAMPLES["minimal"](),
         "hostile": SAMPLES["hostile"]()}
pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed")]

# Rendered size and contrast (WCAG 2) of every number in the heat map.
CELLS = """
(() => {
  const channels = css => css.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const light = css => channels(css).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, k) => sum + v * [0.2126, 0.7152, 0.0722][k], 0);
  const cells = [...document.querySelectorAll('#matrix text.cell')];
  return cells.filter(text => text.getBoundingClientRect().width > 0).map(text => {
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

    check_shown(browser, page, events, width)

    cells = browser.value(CELLS)
    n_tasks = len(PAGES[name]["accuracy_matrix"])
    known = all(task.get("classes") for task in PAGES[name].get("tasks", [{}]))
    most = NARROW if width < 700 else WITH_TEXT
    wanted = n_tasks * (n_tasks + 1) // 2 + (n_tasks if known else 0)  # guessing is the last row
    assert len(cells) == (wanted if 1 < n_tasks <= most else 0)
    for cell in cells:
        assert cell["contrast"] >= 4.5
        assert cell["pixels"] >= 9.5
        assert cell["inside"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_of_the_page_has_contrast(browser, pages, scheme):
    browser.show(pages / "forgetful.html", 1280, scheme)
    assert weak_texts(browser, "p, h1, h2, h3, li, dt, dd, td, th, figcaption, summary, small, "
                               "code, svg text:not(.cell)") == []
