"""The report: what it says, that it stands alone, that nothing a user named becomes markup."""

import html
import html.parser
import json
import re
import runpy
import shlex
from pathlib import Path

import pytest

from partialhn.errors import InputError
from pipelines.platform.numbers import points
from pipelines.report import charts
from pipelines.report.facts import break_even, read_facts
from pipelines.report.page import render, text_summary, write_report
from pipelines.report.verdict import verdict
from pipelines.settings import mask_password

SAMPLES = runpy.run_path(str(Path(__file__).with_name("report_samples.py")))
sample, forgetful, minimal, hostile = (SAMPLES[name] for name in
                                       ("sample", "forgetful", "minimal", "hostile"))
VOID = {"meta", "link", "img", "br"}


class Page(html.parser.HTMLParser):
    """Reads a page strictly: every element closed in order; keeps tags, ids and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


CASES = {
    "5 tasks": sample(5), "20 tasks": sample(20), "100 tasks": sample(100, n_epochs=3),
    "1 task": sample(1), "forgetful": forgetful(), "minimal": minimal(), "hostile": hostile(),
    "one task, nothing else": minimal(((0.5,),)), "all wrong": minimal(((0, None), (0, 0))),
    "all right": minimal(((1, None), (1, 1))),
}


@pytest.fixture(params=CASES)
def result(request):
    return CASES[request.param]


def test_page_is_well_formed_and_needs_nothing_from_outside(result):
    page = Page(render(result))
    assert len(page.ids) == len(set(page.ids))
    assert not {"script", "iframe", "img", "object", "form"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert (attributes.get("href") or "data:").startswith("data:")
        assert "src" not in attributes
    assert "nan" not in page.text.lower().split()
    assert "None" not in page.text


def test_every_chart_has_title_and_description(result):
    page = Page(render(result))
    for tag, attributes in page.tags:
        if tag == "svg":
            assert attributes["role"] == "img"
            assert set(attributes["aria-labelledby"].split()) <= set(page.ids)


@pytest.mark.parametrize("path", [
    (key,) for key in sample(2) if key != "accuracy_matrix"] + [
    ("seconds", "total"), ("seconds", "stages"), ("seconds", "per_task"), ("macs", "trunk"),
    ("bounds", "naive"), ("bounds", "separate_heads", "acc"), ("bounds", "naive", "acc"),
    ("bounds", "separate_heads", "bytes_per_task"), ("seconds", "stages", "train"),
], ids=".".join)
@pytest.mark.parametrize("missing", ["null", "absent"])
def test_any_optional_part_may_be_missing(path, missing):
    result = sample(3)
    *parents, last = path
    holder = result
    for key in parents:
        holder = holder[key]
    if missing == "null":
        holder[last] = None
    else:
        del holder[last]
    assert "None" not in Page(render(result)).text
    assert "None" not in text_summary(result)


@pytest.mark.parametrize("field", ["validation_accuracy", "accuracy", "loss", "task_index"])
def test_epochs_may_have_holes(field):
    result = sample(3)
    for record in result["epochs"]:
        record[field] = None
    Page(render(result))


def test_names_are_text_and_never_markup():
    text = render(hostile())
    page = Page(text)
    assert "<script>" not in text
    assert "<img" not in text
    assert "<script>alert('x')</script>$body ${title}" in page.text
    assert "secret" not in text
    assert "mlflow:***@db.example" in page.text


@pytest.mark.parametrize("name", ["plain", "it's \"quoted\" \\ and\nbroken"])
def test_commands_to_copy_are_quoted(name):
    result = sample(2)
    result["tasks"][0]["name"] = name
    blocks = [html.unescape(block) for block in
              re.findall("<pre><code>(.*?)</code></pre>", render(result), re.DOTALL)]
    command, python, uri, back = blocks
    assert shlex.split(command.replace(" \\\n", ""))[:6] == ["partialhn", "predict", "--model",
                                        "models:/tiny-animals@champion", "--task", name]
    assert uri == "models:/tiny-animals/1"
    for code in (python, back):
        compile(code, "report", "exec")
    assert repr(name) in python


def test_terminal_summary_holds_no_control_characters():
    assert all(letter.isprintable() or letter == "\n" for letter in text_summary(hostile()))


@pytest.mark.parametrize("value", [{}, {"accuracy_matrix": None}, {"accuracy_matrix": []},
                                   {"accuracy_matrix": [[0.5, 0.5]]}])
@pytest.mark.parametrize("show", [render, text_summary])
def test_a_result_without_accuracies_is_refused(show, value):
    with pytest.raises(InputError, match="accuracy_"):
        show(value)


def test_numbers_come_from_the_matrix():
    result = minimal(((0.9, None, None), (0.8, 0.7, None), (0.6, 0.7, 0.8)))
    result["acc"] = 0.123
    text = Page(render(result)).text
    assert "70.0 %" in text           # (0.6 + 0.7 + 0.8) / 3
    assert "80.0 %" in text           # (0.9 + 0.7 + 0.8) / 3
    assert "15.0 pt" in text          # ((0.9 - 0.6) + 0) / 2
    assert "12.3" not in text


def with_bounds(last, separate, naive=None):
    """Two tasks of two classes, the first falling from 0.9 to `last`."""
    result = minimal(((0.9, None), (last, 0.9)))
    result["tasks"] = [{"name": "cats", "classes": ["a", "b"]},
                       {"name": "dogs", "classes": ["c", "d"]}]
    result["bounds"] = {"separate_heads": {"acc": separate},
                        "naive": {"acc": naive} if naive is not None else None}
    return verdict(read_facts(result))


@pytest.mark.parametrize(("last", "separate", "status", "says"), [
    (0.90, 0.90, "good", "still remembers all of them"),
    (0.89, 0.90, "good", "still remembers all of them"),        # forgetting 0.01: just allowed
    (0.889, 0.90, "bad", "forgets"),                     # 0.011
    (0.90, 0.92, "good", "still remembers"),                 # 0.02 behind: just allowed
    (0.90, 0.921, "fair", "less accurate than separate heads"),
    (0.80, 0.95, "bad", "forgets, and it is less accurate"),
])
def test_verdict_is_as_good_as_the_numbers(last, separate, status, says):
    said = with_bounds(last, separate)
    assert said.status == status
    assert says in said.headline


def test_verdict_names_what_was_forgotten_and_how_far_it_fell():
    said = with_bounds(0.6, 0.9, 0.7)
    assert "It forgets" in said.paragraph
    assert "task “cats”, from 90.0 % at its best to 60.0 %" in said.paragraph
    assert "lost 30.0 percentage points on average" in said.paragraph
    assert "guessing would get 50.0 %" in said.paragraph
    assert "reaches 90.0 %: 15.0 points better" in said.paragraph
    assert "ends at 70.0 %: protecting the earlier tasks gains 5.0 points" in (
        said.paragraph)


def test_verdict_admits_that_protection_gained_nothing():
    assert "the protection gained nothing" in with_bounds(0.9, 0.9, 0.9).paragraph
    assert "5.0 points better: on this stream the protection cost more" in (
        with_bounds(0.9, 0.9, 0.95).paragraph)


def test_verdict_admits_that_nothing_was_learned():
    result = minimal(((0.52, None), (0.51, 0.53)))
    result["tasks"] = [{"classes": ["a", "b"]}, {"classes": ["c", "d"]}]
    said = verdict(read_facts(result))
    assert said.status == "bad"
    assert "close to guessing" in said.headline


def test_verdict_names_one_bad_task_behind_a_good_mean():
    table = [[0.9 if j <= i else None for j in range(12)] for i in range(12)]
    table[-1][3] = 0.82                                   # 8 points, 0.7 on average
    said = verdict(read_facts(minimal(table)))
    assert said.status == "fair"
    assert "task “3” lost noticeably" in said.headline


def test_verdict_admits_that_no_bound_was_run():
    assert "cannot say how much accuracy" in verdict(read_facts(minimal())).paragraph


def test_few_test_images_and_skipped_images_are_said():
    result = sample(2)
    result["tasks"][0] |= {"test_images": 50, "bad_images": [
        {"id": f"train/<b>{i}.png", "reason": "truncated"} for i in range(2)]}
    cautions = " ".join(verdict(read_facts(result)).cautions)
    assert "2 unreadable images were left out" in cautions
    assert "50 images, so one image is 2.0 points" in cautions
    text = Page(render(result)).text
    assert "Images left out (2)" in text
    assert "train/<b>1.png truncated" in text


def test_break_even_counts_the_shared_part():
    result = sample(2)
    result |= {"shared_bytes": 1000, "bytes_per_task": 10}
    result["bounds"]["separate_heads"]["bytes_per_task"] = 110
    assert break_even(read_facts(result)) == 11           # 1000 + 110 = 1110 < 11 * 110 = 1210
    result["bounds"]["separate_heads"]["bytes_per_task"] = 10
    assert break_even(read_facts(result)) is None


@pytest.mark.parametrize(("n_tasks", "numbers"), [(10, 55), (25, 325), (26, 0), (100, 0)])
def test_heat_map_drops_its_numbers_when_they_would_not_be_legible(n_tasks, numbers):
    drawn = charts.heat_map("m", [str(i) for i in range(n_tasks)],
                            read_facts(sample(n_tasks, n_epochs=1)).accuracy_TT, "")
    assert drawn.count('class="cell ') == numbers
    assert drawn.count("<rect") == n_tasks * (n_tasks + 1) // 2 + charts.HEAT_BINS


def test_long_streams_show_the_tasks_that_lost_most():
    result = sample(40, drop=0.002, n_epochs=1)
    drops = read_facts(result).metrics.forgetting_per_task
    assert f"the other 14 lost {points(sorted(drops[:-1])[13])} points at most" in (
        Page(render(result)).text)


@pytest.mark.parametrize("n_tasks", [1, 2, 5, 12, 13, 20, 100])
def test_terminal_summary_fits_a_hundred_columns(n_tasks):
    result = sample(n_tasks, n_epochs=1)
    result["tasks"][0]["name"] = "a name that is far too long for a table " * 3
    lines = text_summary(result).splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) <= 60


def test_terminal_summary_holds_the_matrix_and_the_bounds():
    text = text_summary(sample(5))
    table = sample(5)["accuracy_matrix"]
    rows = [line for line in text.splitlines() if re.match(r"\d animals-", line)]
    assert [[float(cell) for cell in row.split()[2:]] for row in rows] == [
        pytest.approx([100 * cell for cell in row if cell is not None], abs=0.051)
        for row in table]
    assert text.isascii()
    for word in ("Partial hypernetwork", "Separate head per task", "Naive fine-tuning",
                 "features 207 MB", "total", "models:/tiny-animals@champion"):
        assert word in text


def test_report_is_written_whole_over_an_older_one(tmp_path):
    path = tmp_path / "new" / "report.html"
    write_report(minimal(), path)
    assert write_report(sample(2), path) == path
    assert path.read_text(encoding="utf-8") == render(sample(2))
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]


def test_names_that_are_no_unicode_text_are_written(tmp_path):
    result = sample(2)
    result["name"] = json.loads('"\\ud800 half a letter"')
    write_report(result, tmp_path / "report.html")
    assert "half a letter" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_path_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_report(minimal(), tmp_path / "file" / "report.html")
    with pytest.raises(InputError, match="cannot be written"):
        write_report(minimal(), tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(("uri", "masked"), [
    ("postgresql://me:pa@ss@host/db", "postgresql://me:***@host/db"),
    ("http://host:5000/path", "http://host:5000/path"),
    ("s3://bucket/prefix", "s3://bucket/prefix"),
    ("https://user:token@host:443", "https://user:***@host:443"),
])
def test_passwords_are_hidden(uri, masked):
    assert mask_password(uri) == masked


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 1e-6), (0, 0), (0.61, 0.68), (0, 1234.5)])
def test_ticks_hold_the_range_and_are_few(low, high):
    ticks = charts.nice_ticks(low, high)
    assert ticks[0] <= low + 1e-9
    assert ticks[-1] >= high - 1e-9
    assert 2 <= len(ticks) <= 8


@pytest.mark.parametrize("values", [[1.0], [0.0], [0.998, 1.0], [0.97, 0.31], [0.0, 1.0]])
def test_accuracy_axis_stays_within_nought_and_one(values):
    ticks = charts.accuracy_ticks(values)
    assert ticks[0] >= -1e-9
    assert ticks[-1] <= 1 + 1e-9
    assert ticks[0] <= min(values) + 1e-9
    assert ticks[-1] >= max(values) - 1e-9


def test_one_task_is_not_compared_with_naive_fine_tuning():
    said = verdict(read_facts(sample(1)))
    assert "naive" not in said.paragraph
    assert "nothing could be forgotten yet" in said.headline


@pytest.mark.parametrize(("last", "says"), [
    (0.9, "none of them lost any accuracy"), (0.8995, "none of them lost as much as 0.1"),
    (0.898, "lost 0.2 percentage points"),
])
def test_small_losses_are_not_called_none(last, says):
    assert says in with_bounds(last, 0.9).paragraph


def test_our_training_time_leaves_out_the_bounds():
    result = sample(2)
    result["seconds"]["per_task"] = [{"name": "a", "train": 3.0}, {"name": "b", "train": 4.5}]
    result["seconds"]["stages"]["train"] = 99.0
    assert read_facts(result).ours.seconds == 7.5
    del result["seconds"]["per_task"]
    assert read_facts(result).ours.seconds == 99.0


def test_the_training_stage_says_how_much_of_it_was_ours():
    result = sample(2)
    assert "were ours" not in render(result)
    result["seconds"]["per_task"] = [{"name": "a", "train": 3.0}, {"name": "b", "train": 4.5}]
    said = Page(render(result)).text
    assert "7.5 s of the training were ours; the rest were the baselines" in said


def test_what_it_costs_not_to_know_the_task_is_said():
    result = sample()
    page, text = render(result), text_summary(result)
    assert "Where nobody says the task" in page
    assert "42.1" in page
    assert "AUROC of 0.71" in page
    assert "Where nobody says the task: accuracy 42.1 %, the right task for 57.3 %" in text
    assert "an AUROC of 0.71 (0.50 is guessing)" in text
    assert "mean over the moments after each task: 53.6 %" in text
    del result["without_task_id"]
    assert "Where nobody says the task" not in render(result) + text_summary(result)
