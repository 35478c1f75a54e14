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
from partialhn.evaluation.certainty import share_interval
from partialhn.numbers import points
from partialhn.training.review import example as review_example
from pipelines.gate import GateFacts, Policy, decide, p_value
from pipelines.report import charts
from pipelines.report.facts import break_even, read_facts
from pipelines.report.judged import judge
from pipelines.report.page import render, text_summary, write_report
from pipelines.report.verdict import verdict
from pipelines.settings import mask_password

SAMPLES = runpy.run_path(str(Path(__file__).with_name("report_samples.py")))
sample, forgetful, refreshed, minimal, hostile = (SAMPLES[name] for name in (
    "sample", "forgetful", "refreshed", "minimal", "hostile"))
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
    "refreshed": refreshed(),
    "one task, nothing else": minimal(((0.5,),)), "all wrong": minimal(((0, None), (0, 0))),
    "all right": minimal(((1, None), (1, 1))),
}


@pytest.fixture(params=CASES)
def result(request):
    return CASES[request.param]


def test_page_is_well_formed_and_needs_nothing_from_outside(result):
    page = Page(render(result))
    assert len(page.ids) == len(set(page.ids))
    assert not {"script", "iframe", "object", "form"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert (attributes.get("href") or "data:").startswith("data:")
        assert attributes.get("src", "data:image/jpeg;base64,").startswith(
            "data:image/jpeg;base64,")
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
    command, python, uri, back = blocks[:4]
    assert shlex.split(command.replace(" \\\n", ""))[:6] == ["partialhn", "predict", "--model",
                                        "models:/tiny-animals@champion", "--task", name]
    assert uri == "models:/tiny-animals/1"
    compile(python, "report", "exec")
    assert shlex.split(back.replace(" \\\n", ""))[:3] == ["partialhn", "models", "rollback"]
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
    result["tasks"] = [{"name": "cats", "classes": ["a", "b"], "test_images": 1000},
                       {"name": "dogs", "classes": ["c", "d"], "test_images": 1000}]
    result["bounds"] = {"separate_heads": {"acc": separate},
                        "naive": {"acc": naive} if naive is not None else None}
    return verdict(read_facts(result))


@pytest.mark.parametrize(("last", "separate", "status", "says"), [
    (0.90, 0.90, "good", "still remembers all of them"),
    (0.89, 0.90, "good", "still remembers all of them"),        # forgetting 0.01: just allowed
    (0.889, 0.90, "fair", "forgets"),                    # 0.011: the gate allows 0.02 a task
    (0.879, 0.90, "bad", "forgets: the gate would refuse task “cats”"),         # 0.021
    (0.90, 0.92, "good", "still remembers"),                 # 0.02 behind: just allowed
    (0.90, 0.921, "fair", "less accurate than separate heads"),
    (0.55, 0.90, "bad", "1 of 2 tasks may be luck: the gate would refuse task “cats”"),
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


def judged_result(rows, classes=2, images=1000, **more):
    """A result of tasks with so many classes and test images each."""
    result = minimal(rows)
    result["tasks"] = [{"name": f"t{j}", "classes": [f"c{k}" for k in range(classes)],
                        "test_images": images, "validation_images": 100}
                       for j in range(len(rows))]
    return result | more


def test_verdict_admits_that_nothing_was_learned():
    said = verdict(read_facts(judged_result(((0.52, None), (0.51, 0.53)))))
    assert said.status == "bad"
    assert "guessing explains its accuracy on every task" in said.headline


def test_a_task_that_the_gate_would_refuse_is_not_called_good():
    """The report asks the gate itself: 7 of 12 right, where guessing gets 4 and rarely 7."""
    result = judged_result(((7 / 12, None), (7 / 12, 0.9)), classes=3, images=12)
    facts = read_facts(result)
    found = judge(facts)[0]
    assert not decide(Policy(), GateFacts("t0", 3, {"t0": 7 / 12}, images=12)).passed
    assert found.refused
    assert found.lucky
    more = found.more_images()
    assert p_value(7 / 12, 1 / 3, 12 + more) <= 0.01 < p_value(7 / 12, 1 / 3, 12 + more - 1)
    said = verdict(facts)
    assert said.status == "bad"
    assert f"{more} more test images of task “t0” would tell" in said.paragraph
    text = Page(render(result)).text
    assert "Not good enough to ship" in text
    assert "✓ Good" not in text
    assert f"{more} more test images with this accuracy would pass" in text
    assert "the gate would refuse 1 of 2 tasks" in " ".join(text_summary(result).split())


def test_the_streams_own_policy_decides_where_it_is_known():
    result = judged_result(((0.9, None), (0.9, 0.9)))
    assert verdict(read_facts(result)).status == "good"
    result["policy"] = {"min_accuracy_new": 0.95, "min_against_linear_probe": 0.0}
    said = verdict(read_facts(result))
    assert said.status == "bad"
    assert "accuracy of at least 95 %" in said.policy
    assert "its accuracy is 90.0 %, wanted at least 95.0 %" in said.cautions[0]


def test_a_result_that_does_not_say_what_a_judgement_needs_is_not_judged():
    said = verdict(read_facts(minimal(((0.9, None), (0.9, 0.9)))))
    assert said.status == "unknown"
    assert "Cannot be judged" in render(minimal())


@pytest.mark.parametrize(("ours", "ridge", "status", "words"), [
    (0.9, 0.75, "good", "it is better on 2 tasks"),
    (0.6, 0.9, "fair", "it is worse on tasks “t0”, “t1” (“t0” by 30.0 points"),
    (0.9, 0.91, "good", "level within the error of its images on 2 tasks")])
def test_the_verdict_judges_beside_ridge_task_by_task(ours, ridge, status, words):
    epochs = [{"task_index": j, "epoch": 1, "validation_accuracy": ours, "ridge_accuracy": ridge}
              for j in (0, 1)]
    result = judged_result(((ours, None), (ours, ours)), epochs=epochs)
    said = verdict(read_facts(result))
    assert said.status == status
    assert words in said.paragraph


def test_ridge_on_the_same_test_images_is_paired():
    """100 test images; ridge alone gets 12 right, the head alone 1: enough to tell."""
    result = judged_result(((0.8, None), (0.8, 0.8)), images=100, review=[
        {"task": "t0", "index": 0, "images": 100, "confused": [], "examples": [],
         "ridge": {"accuracy": 0.91, "only_ours": 0.01, "only_ridge": 0.12}}])
    found = judge(read_facts(result))
    assert found[0].ridge.ahead.mean == pytest.approx(-0.11)
    assert found[0].ridge.ahead.tells
    assert found[1].ridge is None
    assert verdict(read_facts(result)).headline == (
        "Ridge regression, which needs no training, is better on task “t0”.")


def test_what_is_solved_by_ridge_is_said():
    result = judged_result(((0.9, None), (0.9, 0.9)), epochs=[
        {"task_index": 0, "epoch": 1, "validation_accuracy": 0.8, "ridge_accuracy": 0.8,
         "solved": True}])
    said = verdict(read_facts(result)).paragraph
    assert "1 task is solved by ridge regression in closed form" in said
    assert "solved by it" in Page(render(result)).text


def test_intervals_are_95_percent_and_chance_is_named():
    text = Page(render(judged_result(((0.9, None), (0.9, 0.9))))).text
    # 900 of 1000 by Wilson; two tasks of 1000 by Agresti and Coull: p = 902 / 1004
    low, high = share_interval(0.9, 1000)
    assert f"{points(low)} to {points(high)}" in text
    half = 1.959964 * (902 / 1004 * 102 / 1004 / 1004 / 2)**0.5
    assert f"95 % interval {100 * (0.9 - half):.1f} % to {100 * (0.9 + half):.1f} %" in text
    assert "guessing gets 50.0 %" in text
    assert "±" not in text


def test_answers_are_shown_with_what_was_confused():
    shot = review_example(b"", "cat", "dog", 0.7) | {"image": "aGVsbG8="}
    result = judged_result(((0.9, None), (0.9, 0.9)), review=[
        {"task": "t<0>", "index": 0, "images": 50, "ridge": None,
         "confused": [{"class": "c<0>", "taken_for": "c1", "images": 4, "of": 25}],
         "examples": [shot, shot | {"answer": "cat"}, shot | {"image": '"><script>'}]}])
    page = Page(render(result))
    assert "“c<0>” is taken for “c1” in 4 of 25 images" in page.text
    assert "answer: dog" in page.text
    images = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert images == ["data:image/jpeg;base64,aGVsbG8="] * 2, "what is no image is left out"


def test_going_back_is_a_command_that_stays():
    result = sample(3)
    block = html.unescape(re.findall("<pre><code>(partialhn models.*?)</code></pre>",
                                     render(result), re.DOTALL)[0])
    words = shlex.split(block.replace(" \\\n", ""))
    assert words[:7] == ["partialhn", "models", "rollback", "--name", "tiny-animals", "--to", "2"]
    assert "set_registered_model_alias" not in render(result)
    assert "models rollback" not in render(sample(1)), "there is nothing to go back to"
    result["champion"] = 2
    assert "--to 1" in render(result)


def test_a_long_stream_is_a_page_below_two_megabytes():
    result = sample(200, n_epochs=10)
    page = render(result)
    assert len(page.encode()) < 2_000_000
    assert "mean of up to 4 tasks" in page
    assert "All 200 tasks as a table" in page


def test_verdict_names_one_bad_task_behind_a_good_mean():
    table = [[0.9 if j <= i else None for j in range(12)] for i in range(12)]
    table[-1][3] = 0.82                                   # 8 points, 0.7 on average
    said = verdict(read_facts(judged_result(table)))
    assert said.status == "bad", "more than the 2 points that the gate allows a task"
    assert "the gate would refuse task “t3”" in said.headline
    said = verdict(read_facts(judged_result(table, policy={"max_loss_on_earlier_task": None})))
    assert said.status == "fair"
    assert "task “t3” lost noticeably" in said.headline


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


def test_the_detector_is_not_held_against_separate_heads():
    """No baseline has one; it is said beside the comparison."""
    result = sample(2)
    result |= {"shared_bytes": 1000, "bytes_per_task": 60, "detector_bytes_per_task": 50}
    result["bounds"]["separate_heads"]["bytes_per_task"] = 110
    assert break_even(read_facts(result)) == 11
    assert read_facts(result).ours.bytes_per_task == 10
    for text in (Page(render(result)).text, text_summary(result)):
        assert "where nobody says it, adds 50 B more" in " ".join(text.split())
    assert "adds 10 B to the model, against 110 B" in Page(render(result)).text
    del result["detector_bytes_per_task"]
    assert read_facts(result).ours.bytes_per_task == 60  # of another release
    assert "nobody says it, adds" not in text_summary(result)


@pytest.mark.parametrize(("n_tasks", "numbers"), [(10, 55), (25, 325), (26, 0), (100, 0)])
def test_heat_map_drops_its_numbers_when_they_would_not_be_legible(n_tasks, numbers):
    drawn = charts.heat_map("m", [str(i) for i in range(n_tasks)],
                            read_facts(sample(n_tasks, n_epochs=1)).accuracy_TT, "")
    assert drawn.count('class="cell ') == numbers
    cells = n_tasks if n_tasks <= charts.WHOLE else -(-n_tasks // -(-n_tasks // charts.BLOCKS))
    assert drawn.count("<rect") == cells * (cells + 1) // 2 + charts.HEAT_BINS


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
    assert len(lines) <= 62


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
    assert "our training" not in render(result)
    result["seconds"]["per_task"] = [{"name": "a", "train": 3.0}, {"name": "b", "train": 4.5}]
    said = Page(render(result)).text
    assert ("7.5 s of the tasks' time were our training; the rest were the other strategies, the "
            "tests after each task and the start of the workers") in said
    words = " ".join(text_summary(result).split())
    assert "when learned forgotten a task adds learned in" in words
    assert "(tasks: training and tests of every strategy; learned in, above" in words
    assert "Time of this call: startup" in words.replace("\N{NO-BREAK SPACE}", " ")


def test_what_it_costs_not_to_know_the_task_is_said():
    result = sample()
    page, text = render(result), text_summary(result)
    assert "Where nobody says the task" in page
    assert "42.1" in page
    assert "AUROC of 0.71" in page
    assert "Where nobody says the task: accuracy 42.1 %, the right task for 57.3 %\n" in text
    assert "\n3.1 % of these images would get no label" in text
    assert "an AUROC of 0.71 (0.50 is guessing)" in text
    assert "mean over the moments after each task: 53.6 %" in text
    assert "rejects 3.1 % of the images of known tasks" in page
    del result["without_task_id"]["known_rejected"]  # an old result
    assert "no label" not in text_summary(result) + render(result)
    del result["without_task_id"]
    assert "Where nobody says the task" not in render(result) + text_summary(result)


def test_a_task_that_was_learned_again_counts_once_by_its_newest_slot():
    result = refreshed()
    facts, last = read_facts(result), result["accuracy_matrix"][-1]
    assert facts.tasks == ("c", "a", "b"), "in the order in which their newest slots were learned"
    assert facts.labels == ("2 c", "0 a", "1 b"), "with the numbers that predict takes"
    assert facts.metrics.accuracy == pytest.approx(sum(last[2:]) / 3)
    assert facts.accuracy_TT[-1].tolist() == last[2:]
    assert [task["test_images"] for task in facts.details] == [32, 30 + 33, 34]
    assert [image for _, image, _ in facts.bad_images] == ["2.png", "0.png", "3.png", "4.png"]
    assert {epoch["task_index"] for epoch in facts.result["epochs"]} == {0, 1, 2}
    assert [each["task"] for each in facts.result["review"]] == ["c", "a/2026-11", "b/=2026-12"]
    judged = judge(facts)[1]
    assert (judged.images, judged.interval) == (63, share_interval(last[3], 63))
    page = Page(render(result)).text
    assert "3 tasks · 14 classes" in page
    assert "The model learned 3 tasks one after another (14 classes in all)" in page
    assert "one of 14 classes" in page
    assert "a/2026" not in page.partition("Registered versions")[0].partition("The tasks")[2]
    text = text_summary(result)
    assert "3 tasks, 14 classes" in text
    assert [line.split()[:2] for line in text.splitlines()[4:7]] == [
        ["2", "c"], ["0", "a"], ["1", "b"]]


def test_the_command_that_labels_images_says_where_the_stream_lies():
    page = html.unescape(render(sample(2)))
    command = page[page.index("partialhn predict"):].partition("</code>")[0]
    words = shlex.split(command.replace(" \\\n", ""))
    assert words[-4:] == ["--storage", "/data/partialhn",
                          "--tracking-uri", "sqlite:////data/partialhn/mlflow.db"]
