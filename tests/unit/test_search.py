"""When another trial may begin, and what is left to run at the end."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from partialhn.config import Config
from partialhn.errors import InputError
from pipelines.platform.storage import open_storage
from pipelines.search.settings import Budget, SearchConfig
from pipelines.search.space import parse_space
from pipelines.search.state import SearchState
from pipelines.tune.results import FIRST_WORDS, Results, output_folder, write_advice
from pipelines.tune.run import _Search

SAMPLES = runpy.run_path(str(Path(__file__).with_name("search_samples.py")))
record = SAMPLES["record"]


class NoRegistry:
    """Stands where nothing is sent: these tests ask about plans and times alone."""

    def search_run(self, name, settings):
        return "parent"


@pytest.fixture
def results(tmp_path):
    """A search that has finished one trial of 10 s at each of two depths, 40 s ago."""
    state = SearchState(open_storage(str(tmp_path)), "sample")
    state.finish(record("0000", 2, seconds=10.0, at=30.0))
    state.finish(record("0001", 3, seconds=10.0, at=40.0))
    space = parse_space({}, Config(), (2, 3))
    settings = {"name": "sample", "options": SearchConfig().remembered(),
                "config": Config().to_dict(), "space": space.to_dict()}
    return Results(state, settings, space, NoRegistry(), {}, lambda text: None)


def test_the_final_runs_are_the_best_of_each_depth_and_separate_heads(results):
    plans = results.final_plans(2)
    assert [each.id for each in plans] == [
        "final-0000-s1", "bound-0000-s1", "final-0000-s2", "bound-0000-s2",
        "final-0001-s1", "bound-0001-s1", "final-0001-s2", "bound-0001-s2"]
    assert [each.seed for each in plans[:4]] == [1, 1, 2, 2]
    assert {each.config["train"]["strategy"] for each in plans if each.kind == "bound"} == {
        "separate_heads"}
    assert all(Config.from_dict(each.config).backbone.freeze_depth == each.depth
               for each in plans)


def test_the_final_runs_that_are_done_cost_nothing_any_more(results):
    assert results.final_seconds(2) == pytest.approx(8 * 11.0)  # 10 s of training, 1 of testing
    results.records.append(record("final-0000-s1", 2, kind="final", seed=1))
    assert results.final_seconds(2) == pytest.approx(7 * 11.0)


def test_time_goes_on_where_the_last_session_ended(results):
    assert 40 <= results.seconds() < 45


@pytest.mark.parametrize(("budget", "number", "at_once", "holds"), [
    (Budget(trials=5), 4, 1, True), (Budget(trials=5), 5, 1, False),
    # 40 s are over; the final runs take 88 s, of which at most 40 % of the budget are kept
    (Budget(seconds=60), 2, 1, False), (Budget(seconds=80), 2, 1, True),
    (Budget(seconds=200), 2, 1, True), (Budget(seconds=110), 2, 1, True),
    (Budget(seconds=55), 2, 8, True), (Budget(seconds=45), 2, 8, False)])
def test_a_trial_begins_while_the_final_runs_still_fit(results, budget, number, at_once, holds):
    search = SimpleNamespace(packing=SimpleNamespace(at_once=at_once),
                             settings={"options": {"seeds": 2}})
    assert (_Search._spent(search, budget, number, results) < 1) is holds


def test_the_best_trial_so_far_is_one_of_the_search(results):
    """Separate heads, which are no choice of the search, have an accuracy, too."""
    heads = record("bound-0000-s1", 2, (0.99, 0.99), kind="bound", seed=1)
    results.records.append(heads)
    assert "(best trial 60.0 % at depth 2;" in results._line(heads)


def test_advice_that_could_not_be_written_is_refused_before_the_search(tmp_path):
    assert output_folder(str(tmp_path / "new" / "advice")).is_dir()
    (tmp_path / "file").touch()
    for path in ("file", "file/advice"):
        with pytest.raises(InputError, match=r"output is .*file.*allowed: a folder"):
            output_folder(str(tmp_path / path))


def test_the_configurations_of_an_earlier_search_go_and_those_of_the_user_stay(tmp_path):
    write_advice(tmp_path, {"advice.json": "1", "depth-1.yaml": f"{FIRST_WORDS} 1",
                            "depth-3.yaml": f"{FIRST_WORDS} 3"})
    (tmp_path / "depth-mine.yaml").write_text("data: {}")
    write_advice(tmp_path, {"advice.json": "2", "depth-3.yaml": f"{FIRST_WORDS} 3: new"})
    assert {path.name for path in tmp_path.iterdir()} == {
        "advice.json", "depth-3.yaml", "depth-mine.yaml"}
    assert (tmp_path / "depth-3.yaml").read_text().endswith("new")
