"""The advice in a real browser: it shows well on a phone and a desktop, and answers clicks."""

import dataclasses
import runpy
import shutil
import time
from pathlib import Path

import pytest
import yaml

from partialhn.config import Config
from pipelines.advice.decide import results_by_depth
from pipelines.advice.facts import advice_fields
from pipelines.advice.page import render
from pipelines.search.sampling import Goal, Proposals
from pipelines.search.settings import SearchConfig
from pipelines.search.space import parse_space
from tests.browser.pages import check_shown, weak_texts

SAMPLES = runpy.run_path(str(Path(__file__).parents[1] / "unit" / "search_samples.py"))
pytestmark = pytest.mark.skipif(shutil.which("chromium") is None,
                                reason="Debian's chromium is not installed")


def sample():
    """Three depths with 6 trials each, final runs, and prices."""
    base, goal = Config(), Goal("random", 0, "balanced", 0.01)
    space = parse_space({}, base, (2, 3, 4))
    proposals, records = Proposals(space, base, goal, []), []
    accuracy, seconds = {2: 0.62, 3: 0.61, 4: 0.5}, {2: 60.0, 3: 20.0, 4: 1.0}
    for number in range(18):
        plan = proposals.propose(number)
        value = accuracy[plan.depth] - 0.01 * (number % 5)
        found = SAMPLES["record"](plan.id, row=(value, value), seconds=seconds[plan.depth]
                                  + number, at=30.0 * number, serving_macs=10**7 * plan.depth,
                                  feature_bytes=2**(24 - plan.depth) + number,
                                  status="pruned" if number > 15 else "finished")
        records.append(dataclasses.replace(found, plan=plan))
    for each in results_by_depth(records, goal.score):
        for kind in ("final", "bound"):
            for seed in (1, 2, 3):
                row = (accuracy[each.depth] + 0.005 * seed,) * 2
                records.append(SAMPLES["record"](
                    f"{kind}-{each.best.plan.id}-s{seed}", each.depth, row, seconds[each.depth],
                    kind=kind, seed=seed, at=600.0, test_row=row))
    stages = [{"depth": depth, "probe_first": 0.6, "probe_second": 0.5, "cka_first": 0.3,
               "cka_second": 0.2, "kept": 1 - 0.1 * depth, "worth_trying": depth < 4}
              for depth in (2, 3, 4)]
    settings = {"name": "a <stream>", "config": base.to_dict(), "space": space.to_dict(),
                "options": SearchConfig(price_gpu_hour=2.5, price_gib_month=0.02).remembered(),
                "tasks": [{"name": name, "classes": ["x", "y"], "fingerprint": name,
                           "train_images": 100} for name in "ab"]}
    survey = {"forecast": stages, "shifts": {"b": 0.3}, "ridge": {"2": 0.5, "3": 0.63, "4": 0.4},
              "whole_network": {"seconds_per_image": 0.01, "bytes_per_image": 1000.0},
              "held_out_images": [100, 100], "test_images": [50, 50]}
    return advice_fields(settings, space, records, results_by_depth(records, goal.score), goal,
                         survey, 600.0)


@pytest.fixture(scope="module")
def advice():
    return sample()


@pytest.fixture(scope="module")
def page(tmp_path_factory, advice):
    path = tmp_path_factory.mktemp("advice") / "advice.html"
    path.write_text(render(advice), encoding="utf-8")
    return path


def click(browser, selector, index=0):
    """A real mouse click in the middle of an element."""
    x, y = browser.value(f"""(() => {{
      const node = document.querySelectorAll({selector!r})[{index}];
      node.scrollIntoView({{block: "center", behavior: "instant"}});
      const box = node.getBoundingClientRect();
      return [box.x + box.width / 2, box.y + box.height / 2];
    }})()""")
    for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
        browser.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, clickCount=1,
                     button="none" if kind == "mouseMoved" else "left")


def wait_until(browser, expression):
    end = time.monotonic() + 20
    while not browser.value(expression):
        assert time.monotonic() < end, expression
        time.sleep(0.1)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_shows_well(browser, page, width, scheme):
    events = browser.show(page, width, scheme)
    wait_until(browser, "document.querySelectorAll('#progress .scatterlayer path').length > 0")
    check_shown(browser, page, events, width)
    for chart in ("depths", "front", "parallel", "importance", "progress"):
        size = browser.value(f"(b => [b.width, b.height])(document.querySelector('#{chart} "
                             ".main-svg').getBoundingClientRect())")
        assert size[0] >= 300, chart
        assert size[1] >= 300, chart


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_contrast(browser, page, scheme):
    browser.show(page, 1280, scheme)
    wait_until(browser, "document.querySelectorAll('#progress .scatterlayer path').length > 0")
    assert weak_texts(browser, "p, h1, h2, h3, dt, dd, td, th, figcaption, summary, button, "
                               "select, label, svg text") == []


@pytest.mark.parametrize("width", [390, 1280])
def test_a_click_on_a_point_shows_its_trial_and_configuration(browser, page, advice, width):
    browser.show(page, width, "light")
    chosen = advice["recommendation"]
    title = "document.getElementById('trial-title').textContent"
    wait_until(browser, "document.querySelectorAll('#front .scatterlayer .point').length > 0")
    assert browser.value(title) == f"Trial {chosen['trial']}, depth {chosen['depth']}"
    points = browser.value("document.querySelectorAll('#front .scatterlayer .point').length")
    finished = [each for each in advice["trials"] if each["kind"] == "search"
                and each["status"] == "finished"]
    assert points == len(finished)
    last = [each for each in finished if each["depth"] == 4][-1]
    click(browser, "#front .scatterlayer .point", points - 1)
    wait_until(browser, f"{title} === 'Trial {last['id']}, depth 4'")
    config = Config.from_dict(yaml.safe_load(browser.value(
        "document.getElementById('yaml').textContent")))
    assert config.backbone.freeze_depth == 4
    assert config.train.learning_rate == pytest.approx(last["params"]["train.learning_rate"])


def test_buttons_and_the_list_of_trials_work(browser, page, advice):
    browser.show(page, 1280, "light")
    wait_until(browser, "document.querySelectorAll('#front .xtitle').length > 0")
    axis = "document.querySelector('#front .xtitle').textContent"
    assert "seconds" in browser.value(axis)
    click(browser, "button[data-cost]", 1)
    wait_until(browser, f"{axis}.includes('MB')")
    assert browser.value("document.querySelector('[data-cost=feature_bytes]')"
                         ".getAttribute('aria-pressed')") == "true"
    other = advice["trials"][-1]["id"]
    browser.value(f"(p => {{ p.value = '{other}'; p.dispatchEvent(new Event('change')); "
                      "return true; })"
                  "(document.getElementById('pick'))")
    text = browser.value("document.getElementById('facts').textContent")
    assert "Test accuracy" in text
    assert "separate_heads" in browser.value("document.getElementById('yaml').textContent")
