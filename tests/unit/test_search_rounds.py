"""The depths that a search adds around the best one, and how its trials are divided among them."""

import json
from pathlib import Path

import pytest

from partialhn.config import BackboneConfig, Config
from partialhn.errors import InputError, IntegrityError
from pipelines.platform.storage import open_storage
from pipelines.search.depths import coarse_grid, find_depths
from pipelines.search.rounds import Round, Rounds, add_round, around, load_rounds
from pipelines.search.sampling import Goal, Proposals
from pipelines.search.space import DEPTH, parse_space
from pipelines.search.state import SearchState

BLOCKS = Config(backbone=BackboneConfig("partialhn:slim_resnet18", 7))
SPACE = parse_space({"defaults": False}, BLOCKS)


def test_a_network_of_few_depths_is_searched_at_all_of_them():
    assert find_depths(Config()).first == (0, 1, 2, 3, 4)
    assert not parse_space({}, Config()).refines


def test_the_coarse_grid_takes_equal_steps_of_multiply_adds():
    assert coarse_grid([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]) == (2, 4, 6, 8, 10)
    assert coarse_grid([0, 0.5, 0.72, 0.75, 0.8, 0.85, 1]) == (1, 4, 6)  # a large first block
    assert find_depths(BLOCKS).first == (2, 4, 6, 7, 9)
    assert SPACE.depths() == [2, 4, 6, 7, 9]
    assert SPACE.possible_depths() == list(range(10))


@pytest.mark.parametrize(("best", "tried", "added"), [
    (6, [2, 4, 6, 9], [5, 7]), (2, [2, 6], [1, 4]), (9, [5, 9], [7]), (5, [4, 5, 6], []),
    (0, [0, 4], [2]), (0, [0, 1], []), (9, [8, 9], []), (4, [1, 4, 7], [3, 5]), (8, [8], [4, 9])])
def test_the_middles_on_both_sides_of_the_best_depth_are_added(best, tried, added):
    assert around(best, tried, 9) == added


def search(budget, best, extra=0):
    """The depths of all trials of a search with this many trials, where `best` says how good each
    depth is; with `extra` trials once it has ended.
    """
    rounds, number, depths = Rounds(SPACE), 0, []
    for size in (budget, budget + extra):
        while number < size:
            if rounds.over(number, number / size):
                rounds.all.append(rounds.following(number, max(set(depths), key=best)))
            depths.append(rounds.point(number)[0][DEPTH])
            number += 1
    return depths


@pytest.mark.parametrize("peak", range(10))
def test_the_search_reaches_the_best_block_wherever_it_is(peak):
    depths = search(27, lambda depth: -abs(depth - peak))
    assert depths[:15] == [2, 4, 6, 7, 9] * 3
    tried = set(depths)
    assert tried >= {peak, max(peak - 1, 0), min(peak + 1, 9)}
    assert len(tried) <= 9
    assert min(map(depths.count, tried)) >= 3  # every depth has as many trials as a coarse one


def test_a_small_budget_is_spent_on_the_coarse_grid():
    assert search(6, lambda depth: -abs(depth - 4)) == [2, 4, 6, 7, 9, 3]


def test_a_larger_budget_goes_to_all_depths_that_were_tried():
    depths = search(27, lambda depth: -abs(depth - 7), extra=20)
    assert set(depths[27:]) == set(depths[:27])


def test_the_first_trial_at_an_added_depth_is_the_users_configuration():
    rounds = Rounds(SPACE, [Round(5, (3, 5), 2), Round(7, (2, 3, 4, 5, 6, 7, 9), 7)])
    proposals = Proposals(SPACE, BLOCKS, Goal("random", 0, "accuracy", 0.01), [], rounds)
    assert [proposals.propose(number).depth for number in range(9)] == [2, 4, 6, 7, 9, 3, 5, 2, 3]
    assert [rounds.point(number)[1] for number in (4, 5, 6, 7, 8)] == [True] * 3 + [False] * 2


def test_rounds_are_stored_once_and_found_again(tmp_path):
    state = SearchState(open_storage(str(tmp_path)), "sample")
    rounds = load_rounds(state, SPACE)
    add_round(state, rounds, 5, 4)
    assert rounds.depths == [2, 3, 4, 5, 6, 7, 9]
    assert load_rounds(state, SPACE).all == rounds.all == [
        Round(0, (2, 4, 6, 7, 9)), Round(5, (3, 5), 2)]
    again = load_rounds(state, SPACE)
    again.all.pop()
    add_round(state, again, 5, 9)  # the round that was stored first counts
    assert again.all == rounds.all
    (Path(state.folder) / "round-1.json").write_text('{"first": 1}', encoding="utf-8")
    with pytest.raises(IntegrityError, match=r"round-1\.json"):
        load_rounds(state, SPACE)


@pytest.mark.parametrize(("values", "depths", "tried"), [
    ({}, ("75%", "layer1.0", 9), [2, 7, 9]), ({}, ("75%", 7), [7]),
    ({DEPTH: {"grid": ["stem", "50%"]}}, None, [1, 4]), ({DEPTH: "layer3.1"}, None, [7]),
    ({DEPTH: {"uniform": [1, 3]}}, None, [1, 2, 3]),
    ({DEPTH: {"refine": [5, "100%"]}}, None, [5, 9]),
    ({DEPTH: {"refine": [5]}}, (3, 4), [3, 4])])
def test_depths_are_numbers_names_of_blocks_or_shares(values, depths, tried):
    space = parse_space({"defaults": False} | values, BLOCKS, depths)
    assert space.depths() == tried
    assert space.refines is ("refine" in values.get(DEPTH, "") and not depths)
    assert parse_space(json.loads(json.dumps(space.to_dict())), BLOCKS) == space


@pytest.mark.parametrize(("values", "depths", "words"), [
    ({}, (10,), "freeze_depth is 10; allowed: 0 .* to 9"),
    ({}, ("layer9",), "a block: stem, layer"),
    ({DEPTH: {"grid": ["120%"]}}, None, "freeze_depth is '120%'"),
    ({DEPTH: {"refine": []}}, None, "a list of values"),
    ({"train.epochs": {"refine": [1, 2]}}, None, "only backbone.freeze_depth is refined")])
def test_depths_that_the_network_does_not_have_are_named(values, depths, words):
    with pytest.raises(InputError, match=words):
        parse_space(values, BLOCKS, depths)
