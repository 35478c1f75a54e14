"""The documentation as it is built: no network, no page wider than its window, search in files."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium")
pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed")]
WIDTHS = ((390, "dark"), (1280, "light"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet",
                    "--site-dir", str(folder)], cwd=ROOT, check=True)
    return folder


@pytest.mark.parametrize(("width", "scheme"), WIDTHS)
def test_every_page_fits_its_window_and_asks_no_network(site, browser, width, scheme):
    pages = [page for page in sorted(site.rglob("*.html")) if page.name != "404.html"]
    assert len(pages) > 30
    for page in pages:
        events = browser.show(page, width, scheme)
        asked = [event["params"]["request"]["url"] for event in events
                 if event.get("method") == "Network.requestWillBeSent"]
        assert asked
        assert all(url.startswith(("file:", "data:", "blob:")) for url in asked), (page, asked)
        wide = browser.value("document.documentElement.scrollWidth")
        assert wide <= width, f"{page.relative_to(site)} is {wide} pixels wide"
        unloaded = browser.value(
            "[...document.images].filter(image => !image.naturalWidth).map(image => image.src)")
        assert not unloaded


@pytest.mark.parametrize("words", ["champion", "忘却"])
def test_search_finds_pages_that_are_opened_as_files(site, browser, words):
    browser.show(site / "index.html", 1280, "light")
    browser.call("Page.navigate", url=f"{(site / 'index.html').as_uri()}?q={words}")
    deadline = time.time() + 30
    while time.time() < deadline:
        links = browser.value(
            "[...document.querySelectorAll('.md-search-result__link')].map(link => link.href)")
        if links:
            break
        time.sleep(0.2)
    assert links
    assert all(link.startswith("file:") for link in links)
