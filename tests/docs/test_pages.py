"""The form of the pages: links that lead somewhere, guides with a promise and a way on."""

import re

import pytest

from tests.docs.pages import PAGES, ROOT

LINK = re.compile(r"\]\((?!https?://|#|mailto:)([^)#\s]+)(?:#[^)]*)?\)")
GENERATED = {"docs/reference/cli.md", "docs/reference/configuration.md", "docs/reference/python.md"}
GUIDES = [page for page in PAGES if page.startswith("docs/how-to/")]


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_somewhere(page):
    missing = []
    for link in LINK.findall(PAGES[page]):
        path = (ROOT / page).parent.joinpath(link).resolve()
        if not path.exists() and str(path.relative_to(ROOT)) not in GENERATED:
            missing.append(link)
    assert not missing


@pytest.mark.parametrize("page", GUIDES)
def test_a_guide_says_what_you_get_and_where_to_go_next(page):
    paragraphs = PAGES[page].strip().split("\n\n")
    assert paragraphs[1].startswith("You get: ")
    assert paragraphs[-1].startswith("Next: ")


def test_the_readme_is_one_page_with_its_parts_in_order():
    text = PAGES["README.md"]
    assert len(text.splitlines()) <= 150
    order = ["docs/assets/overview.svg", "## Install", "```python", "## Results", "## Strategies",
             "## What it is not for", "## Where to go next", "## Citation and licence"]
    places = [text.index(part) for part in order]
    assert places == sorted(places)


def test_both_pages_for_the_decision_maker_hold_the_same_numbers():
    def numbers(page):
        return {number for number in re.findall(r"\d+(?:[.,]\d+)?(?= ?(?:%|kB|MB|GB|枚|秒|s\b))",
                                                PAGES[page])}
    english, japanese = numbers("docs/en/decision-maker.md"), numbers("docs/ja/decision-maker.md")
    assert english - {"1"} <= japanese | {"1,797", "1,500"}
    assert {"61.4", "19.9", "32.4", "57.1", "3.3", "975", "3.9"} <= english & japanese
