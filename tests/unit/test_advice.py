"""The advice against numbers worked by hand."""

import dataclasses
import json
import runpy
from pathlib import Path

import numpy as np
import pytest

from partialhn.config import BackboneConfig, Config
from partialhn.evaluation.intervals import Interval
from partialhn.numbers import points
from pipelines.advice import words
from pipelines.advice.decide import (
    agreement,
    choose,
    expected_best,
    front,
    more_search,
    noise,
    rank_correlation,
    results_by_depth,
)
from pipelines.advice.facts import advice_fields
from pipelines.advice.held_out import HeldOut
from pipelines.advice.money import GIB, Prices, Way, yearly
from pipelines.advice.page import render
from pipelines.cli.tune import summary
from pipelines.search.depths import find_depths
from pipelines.search.sampling import Goal
from pipelines.search.settings import SearchConfig
from pipelines.search.space import parse_space
from pipelines.search.state import pack_answers, parse_record

SAMPLES = runpy.run_path(str(Path(__file__).with_name("search_samples.py")))
record, measured = SAMPLES["record"], SAMPLES["measured"]
STAGES = find_depths(Config())
BLOCKS = find_depths(Config(backbone=BackboneConfig("partialhn:slim_resnet18")))
GOAL = Goal("random", 0, "accuracy", 0.01)


def three_depths():
    """Depth 1 best and slow, depth 3 nearly as good and 4 times faster, depth 4 poor."""
    records = [record("0000", 1, (0.80, 0.80), 80.0, at=1), record("0001", 3, (0.79, 0.80), 20.0),
               record("0002", 4, (0.79, 0.60), 1.0), record("0003", 3, (0.5, 0.6), 20.0),
               record("0004", 3, (0.4,), status="pruned"), record("0005", 4, status="failed")]
    for origin, depth, row, seconds in (("0000", 1, (0.80, 0.80), 80.0),
                                        ("0001", 3, (0.79, 0.80), 20.0),
                                        ("0002", 4, (0.79, 0.60), 1.0)):
        for seed, shift in ((1, -0.002), (2, 0.002)):
            moved = tuple(value + shift for value in row)
            records.append(record(f"final-{origin}-s{seed}", depth, moved, seconds, kind="final",
                                  seed=seed, test_row=(0.7, 0.8)))
            records.append(record(f"bound-{origin}-s{seed}", depth, (row[0] + shift + 0.01,) * 2,
                                  seconds, kind="bound", seed=seed, bytes_per_task=1 << 20))
    return records


def by_depth():
    return results_by_depth(three_depths(), GOAL.score)


def test_the_interval_is_students():
    interval = Interval.of([0.5, 0.7])
    assert interval.mean == pytest.approx(0.6)
    assert interval.high - interval.mean == pytest.approx(12.7062 * 0.1, rel=1e-4)
    assert Interval.of([0.5]).low is None


def test_the_best_trial_of_each_depth_and_its_final_runs():
    found = by_depth()
    assert [(each.depth, each.best.plan.id) for each in found] == [
        (1, "0000"), (3, "0001"), (4, "0002")]
    middle = found[1]
    assert middle.counts == {"finished": 2, "pruned": 1, "failed": 0}
    assert [each.plan.id for each in middle.finals] == ["final-0001-s1", "final-0001-s2"]
    assert middle.accuracy.mean == pytest.approx(0.795)
    assert middle.per_task == pytest.approx([0.79, 0.80])


def test_a_depth_without_a_finished_trial_is_left_out():
    records = [record("0000", 1), record("0001", 2, (0.5,), status="pruned")]
    assert [each.depth for each in results_by_depth(records, GOAL.score)] == [1]


def test_final_runs_of_another_trial_do_not_count():
    records = [record("0000", 1), record("final-0009-s1", 1, kind="final", seed=1)]
    assert results_by_depth(records, GOAL.score)[0].finals == ()


def test_the_front_has_what_nothing_beats():
    records = [record("a", row=(0.8, 0.8), seconds=10), record("b", row=(0.7, 0.7), seconds=5),
               record("c", row=(0.6, 0.6), seconds=7), record("d", row=(0.8, 0.8), seconds=12),
               record("e", row=(0.1, 0.1), seconds=99, feature_bytes=1),
               record("f", row=(0.9,), status="pruned")]
    assert front(records) == ["a", "b", "e"]


@pytest.mark.parametrize(("objective", "max_loss", "depth"), [
    ("accuracy", 0.01, 1), ("cost", 0.01, 3), ("cost", 0.2, 4), ("cost", 0.001, 1),
    # 3: 0.795 - 0.01 * log2(20) = 0.752; 1: 0.8 - 0.01 * log2(80) = 0.737; 4: 0.695
    ("balanced", 0.01, 3), ("balanced", 0.05, 4), ("balanced", 0.0001, 1)])
def test_the_objective_chooses(objective, max_loss, depth):
    accuracy, cost = {1: 0.8, 3: 0.795, 4: 0.695}, {1: 80.0, 3: 20.0, 4: 1.0}
    assert choose(accuracy, cost, objective, max_loss) == depth


def test_of_two_equal_depths_the_cheaper():
    assert choose({1: 0.8, 2: 0.8}, {1: 8.0, 2: 4.0}, "accuracy", 0.01) == 2


def test_what_the_seeds_cannot_tell_apart_is_not_paid_for():
    """Values 0.727 (depth 1, dear), 0.722 (2) and 0.65 (3), accuracies 1 and 10 points apart."""
    accuracy, cost = {1: 0.8, 2: 0.79, 3: 0.70}, {1: 160.0, 2: 113.0, 3: 32.0}
    for objective in ("balanced", "accuracy"):
        assert choose(accuracy, cost, objective, 0.01) == 1
        assert choose(accuracy, cost, objective, 0.01, 0.012) == 2
        assert choose(accuracy, cost, objective, 0.01, 0.5) == 3
    assert choose(accuracy, cost, "cost", 0.001, 0.5) == 1


def test_a_loss_that_the_seeds_show_is_not_recommended_because_it_is_cheap():
    """The cheap depth loses 8 points, and its value 3.7 of them, within a margin of 4.5."""
    accuracy, cost = {17: 0.73, 18: 0.65}, {17: 2.8, 18: 0.14}
    assert choose(accuracy, cost, "balanced", 0.01, 0.045) == 17
    assert choose(accuracy, cost, "balanced", 0.01, 0.09) == 18


def repeated(depth, final, bound=()):
    """The best trial of a depth and its runs under seeds 1, 2, ..."""
    name = f"{depth:04d}"
    return [record(name, depth, (0.5, 0.5), 1.0),
            *(record(f"final-{name}-s{seed}", depth, (value, value), kind="final", seed=seed)
              for seed, value in enumerate(final, 1)),
            *(record(f"bound-{name}-s{seed}", depth, (value, value), kind="bound", seed=seed)
              for seed, value in enumerate(bound, 1))]


def noise_of(*runs):
    return noise(results_by_depth([each for depth in runs for each in depth], GOAL.score))


def test_the_noise_is_what_runs_do_differently_under_the_same_seeds():
    assert noise(by_depth()) == pytest.approx(0, abs=1e-12), "a seed moves all of them alike"
    # differences of the seeds 0.04, 0.02, 0.00, 0.02: half their deviations from 0.02 twice each,
    # so s^2 = 4 * 0.01^2 / 3, t(3) = 3.1824, two seeds
    found = noise_of(repeated(1, (0.70, 0.74), (0.7, 0.72)), repeated(2, (0.6, 0.6), (0.6, 0.62)))
    assert found == pytest.approx(3.182446 * (4 * 0.01**2 / 3 * 2 / 2)**0.5, rel=1e-5)


def test_the_noise_needs_two_depths_and_two_seeds_and_whole_bounds():
    assert noise(results_by_depth([record("0000", 1)], GOAL.score)) == 0
    assert noise_of(repeated(1, (0.7, 0.74))) == 0
    assert noise_of(repeated(1, (0.7,)), repeated(2, (0.6,))) == 0
    alone = noise_of(repeated(1, (0.70, 0.74)), repeated(2, (0.6, 0.6)))
    assert alone == pytest.approx(12.7062 * (4 * 0.01**2 / 1 * 2 / 2)**0.5, rel=1e-4)
    assert noise_of(repeated(1, (0.70, 0.74), (0.7,)), repeated(2, (0.6, 0.6))) == alone


def test_each_seed_votes_alone():
    found = [record("0000", 1, (0.8, 0.8), 8.0), record("0001", 2, (0.8, 0.8), 8.0)]
    for seed, one, two in ((1, 0.9, 0.8), (2, 0.8, 0.9), (3, 0.9, 0.7)):
        found += [record(f"final-0000-s{seed}", 1, (one, one), kind="final", seed=seed),
                  record(f"final-0001-s{seed}", 2, (two, two), kind="final", seed=seed)]
    results = results_by_depth(found, GOAL.score)
    assert agreement(results, {1: 8.0, 2: 8.0}, "accuracy", 0.01) == {1: 2, 2: 1}
    without = [each for each in found if each.plan.id != "final-0001-s1"]  # it failed
    assert agreement(results_by_depth(without, GOAL.score), {1: 8.0, 2: 8.0}, "accuracy",
                     0.01) == {1: 1, 2: 1}, "seeds 2 and 3, each against itself"


def test_the_expected_best_of_some_trials():
    assert expected_best([1, 2, 3, 4], 4) == 4
    assert expected_best([1, 2, 3, 4], 1) == pytest.approx(2.5)
    # of the 6 pairs the larger is 2 once, 3 twice, 4 three times
    assert expected_best([4, 1, 3, 2], 2) == pytest.approx((2 + 2 * 3 + 3 * 4) / 6)


def test_the_value_of_more_search_shrinks_by_the_last_ratio():
    found = more_search([1, 2, 3, 4])
    last, before = 4 - 20 / 6, 20 / 6 - 2.5
    assert found == {"trials": 4, "last_doubling": pytest.approx(last),
                     "next_doubling": pytest.approx(last * last / before)}
    assert more_search([1, 2, 3]) is None
    assert more_search([0.5] * 8)["next_doubling"] == 0


def test_the_forecast_is_judged_by_ranks():
    stages = [{"depth": 1, "kept": 0.9}, {"depth": 3, "kept": 0.8}, {"depth": 4, "kept": 0.7}]
    assert rank_correlation(stages, by_depth()) == pytest.approx(1)
    assert rank_correlation(stages[::-1], by_depth()) == pytest.approx(1)
    turned = [stage | {"kept": 1 - stage["kept"]} for stage in stages]
    assert rank_correlation(turned, by_depth()) == pytest.approx(-1)
    assert rank_correlation(stages, by_depth()[:2]) is None
    assert rank_correlation([stages[0] | {"kept": None}, *stages[1:]], by_depth()) is None


def test_equal_forecasts_have_no_ranks(recwarn):
    stages = [{"depth": depth, "kept": 0.9} for depth in (1, 3, 4)]
    assert rank_correlation(stages, by_depth()) is None
    assert not recwarn.list


# Words ---------------------------------------------------------------------------------------


MANY, FEW = HeldOut((100_000, 100_000), 0.5), HeldOut((20, 20), 0.5)


def test_the_reason_says_what_is_lost_saved_needed_and_lost_further_down():
    found = by_depth()
    text = words.reason(found, found[1], {"b": 0.3}, STAGES, MANY)
    assert text == (
        "Freezing through layer3 loses 0.5 points (95 % interval 0.3 to 0.7) against the most "
        "accurate depth (freezing through layer1), trains 4.0 times faster and needs 1.1 GB of "
        "stored features. Going deeper (freezing everything but the classifier) costs 10.0 points "
        "(95 % interval 9.7 to 10.3), most on task 'b' (20.0 points), which differs most from the "
        "first: 30 % of the variance of its features lies outside that of the first task.")


def test_few_images_tell_nothing_and_the_reason_says_how_many_would():
    found = by_depth()
    text = words.reason(found, found[1], {"b": 0.3}, STAGES, FEW)
    lost = FEW.ahead(found[0], found[1])
    assert not lost.tells
    assert (f"loses 0.5 points (95 % interval {points(lost.low)} to {points(lost.high)}; too few "
            f"to tell: {lost.more_images():,} more held-out images would)") in text
    assert "keeps" not in text
    assert "most on task" not in text, "nothing is told task by task that the whole does not tell"
    for share, tells in ((1.05, True), (0.9, False)):
        enough = round(share * (40 + lost.more_images()) / 2)
        assert HeldOut((enough, enough), 0.5).ahead(found[0], found[1]).tells is tells


def test_answers_to_the_same_images_are_paired():
    """Every image that depth 3 gets right depth 1 gets right, so few images tell one of them."""
    def trial(name, depth, right):
        packed = (pack_answers(np.arange(400) < right),) * 2
        return [record(name, depth, (right / 400,) * 2, right=packed),
                *(record(f"final-{name}-s{seed}", depth, (right / 400,) * 2, kind="final",
                         seed=seed, right=packed) for seed in (1, 2))]
    found = results_by_depth(trial("0000", 1, 320) + trial("0001", 3, 304), GOAL.score)
    held_out = HeldOut((400, 400), 0.5)
    paired = held_out.ahead(found[0], found[1])
    assert paired.mean == pytest.approx(0.04)
    assert paired.tells
    assert held_out.ahead_by_task(found[0], found[1])[1].tells
    bare = [dataclasses.replace(each, finals=tuple(
        dataclasses.replace(final, measured=dataclasses.replace(final.measured, right=None))
        for final in each.finals)) for each in found]
    assert held_out.ahead(bare[0], bare[1]).half > 2 * paired.half


def test_a_record_keeps_its_answers():
    written = record("final-0000-s1", kind="final",
                     right=(pack_answers(np.arange(9) % 2 == 0), pack_answers(np.arange(3) > 0)))
    stored = parse_record("here", json.loads(written.to_json()))
    assert stored == written
    assert [each.tolist() for each in stored.measured.answers((9, 3))] == [
        [True, False] * 4 + [True], [False, True, True]]
    old = json.loads(written.to_json())
    del old["measured"]["right"]
    assert parse_record("here", old).measured.answers((9, 3)) is None


def test_the_words_for_a_depth_are_the_names_of_the_network_that_is_cut():
    assert [STAGES.freezing(depth) for depth in range(5)] == [
        "nothing", "through layer1", "through layer2", "through layer3",
        "everything but the classifier"]
    assert [BLOCKS.freezing(depth) for depth in (0, 1, 4, 9)] == [
        "nothing", "through stem", "through layer2.0", "everything but the classifier"]


def test_the_reason_names_blocks_where_the_network_is_cut_at_blocks():
    found = by_depth()
    text = words.reason(found, found[1], {}, BLOCKS, MANY)
    assert text.startswith("Freezing through layer1.1 loses 0.5 points (95 % interval 0.3 to 0.7) "
                           "against the most accurate depth (freezing through stem)")
    assert "Going deeper (freezing through layer2.0) costs 10.0 points" in text
    assert "No deeper depth was compared." in words.reason(found[:2], found[1], {}, BLOCKS, MANY)
    assert words.reason(found[2:], found[2], {}, STAGES, MANY).endswith("stored features.")


@pytest.mark.parametrize(("other", "depths", "subject"), [
    (3, "STAGES", "One stage less"), (3, "BLOCKS", "One block less"),
    (1, "STAGES", "Freezing through layer1"), (1, "BLOCKS", "Freezing through stem")])
def test_the_next_shallower_depth_is_named_by_its_distance(other, depths, subject):
    found = results_by_depth([record("0000", other, (0.7, 0.7), 20.0),
                              record("0001", 4, (0.8, 0.8), 10.0)], GOAL.score)
    assert (f"{subject} takes 2.0 times as long to train and is 10.0 points (95 % interval 9.7 to "
            "10.3) less accurate.") in words.reason(found, found[1], {}, globals()[depths], MANY)


def test_a_task_that_does_not_differ_most_is_not_blamed():
    found = by_depth()
    text = words.reason(found, found[1], {"b": 0.3, "c": 0.4}, STAGES, MANY)
    assert "most on task 'b'" in text
    assert "differs" not in text


def test_the_reason_for_the_most_accurate_depth():
    found = by_depth()
    text = words.reason(found, found[0], {}, STAGES, MANY)
    assert text.startswith("Freezing through layer1 has the best accuracy that was measured, "
                           "80.0 %")
    assert "costs 0.5 points (95 % interval 0.3 to 0.7), most on task 'a'" in text


def test_how_sure_it_is():
    found = by_depth()
    assert words.preferred(found[1], 3, 0.01, STAGES) == ""
    assert words.preferred(found[1], 1, 0.012, STAGES) == (
        "Freezing through layer1 is ahead by less than the 95 % margin of the seeds (1.2 points), "
        "so the cheaper depth is recommended.")
    said = words.sure(found[1], {3: 2}, STAGES, MANY)
    # the seeds differ by 0.4 points: t(1) 12.706 * 0.2 points = 2.5 points each way
    assert said.startswith(
        "Its held-out accuracy is 79.5 % (95 % interval 77.0 % to 82.0 %), 29.5 points above "
        "guessing (50.0 %), on 200,000 held-out images and 2 seeds.")
    assert "Each seed alone recommends the same depth (2 of 2)" in said
    assert "1 of the 2 seeds alone" in words.sure(found[1], {3: 1, 1: 1}, STAGES, MANY)
    assert ("None of the 2 seeds alone recommend the same depth (the others: freeze 2 through "
            "layer1)") in words.sure(found[1], {1: 2}, STAGES, MANY)
    bare = dataclasses.replace(found[1], finals=())
    assert "not known" in words.sure(bare, {}, STAGES, MANY)


def test_one_seed_does_not_vote():
    one = dataclasses.replace(by_depth()[1], finals=by_depth()[1].finals[:1])
    said = words.sure(one, {3: 1}, STAGES, MANY)
    assert "1 of 1" not in said
    assert "One seed does not show how much the result depends on the seed" in said


def test_an_accuracy_that_guessing_may_reach_is_not_called_learned():
    near = HeldOut((20, 20), 0.75)
    said = words.sure(by_depth()[1], {3: 2}, STAGES, near)
    more = near.above_chance(by_depth()[1]).more_images()
    assert "4.5 points above guessing (75.0 %)" in said
    assert "Whether it is better than guessing: too few to tell: " in said
    assert f"{more:,} more held-out images would" in said or "more seeds" in said


def test_beside_separate_heads_it_says_how_far_and_how_sure():
    found = by_depth()
    assert words.beside_separate_heads(found[1], MANY) == (
        "Against one separate head a task, which stores 1.0 MB a task instead of 1.0 kB, it is "
        "0.5 points (95 % interval 0.3 to 0.7) behind.")
    assert "too few to tell" in words.beside_separate_heads(found[1], FEW)


def test_plain_ridge_is_named_where_it_wins():
    found = by_depth()  # 0.8, 0.795 and 0.695 are the accuracies of depths 1, 3 and 4
    said = words.beside_ridge(found, found[0], {"1": 0.7, "3": 0.85, "4": 0.745}, MANY)
    assert said.startswith(
        "Plain ridge regression on pooled features (--strategy ridge), which needs no training, is "
        "better at depth 3 by 5.5 points (95 % interval ")
    assert "and at depth 4 by 5.0 points" in said
    assert "At its best, depth 3, it is 5.0 points (95 % interval " in said
    assert said.endswith(" ahead of the recommendation.")
    assert words.beside_ridge(found, found[0], {"1": 0.7, "4": 0.75}, MANY).endswith(
        " behind the recommendation.")
    assert "may be better at depth 3 by 5.5 points" in words.beside_ridge(
        found, found[1], {"1": 0.7, "3": 0.85, "4": 0.6}, FEW)
    both = words.beside_ridge(found, found[1], {"3": 1.0, "4": 0.745}, FEW)
    assert "needs no training, is better at depth 3 by 20.5 points (95 % interval " in both
    assert "; it may be better at depth 4 by 5.0 points (" in both
    assert words.beside_ridge(found, found[1], {"1": 0.7, "3": 0.75, "4": 0.6}, MANY).startswith(
        "Plain ridge regression on pooled features is nowhere better; it is nearest at depth 3, "
        "4.5 points (95 % interval ")
    assert words.beside_ridge(found, found[1], {}, MANY) == ""


def test_whether_to_search_on():
    estimate = {"trials": 8, "last_doubling": 0.004, "next_doubling": 0.002}
    assert "stop here" in words.search_value(estimate, 0.006)
    assert "more search may help" in words.search_value(estimate, 0.001)
    assert "too few" in words.search_value(None, None)


# Money ---------------------------------------------------------------------------------------


def test_a_year_on_features():
    # half an hour a task at 2 an hour: 1 a task, 24 tasks; storage 78 * 2 * 0.5 GiB at 0.1
    row = yearly(Way("ours", 1800, GIB / 2, False, 0.8), Prices(2, 0.1, 2))
    assert row == {"way": "ours", "accuracy": 0.8, "retraining": 1, "retraining_seconds": 1800,
                   "computing_a_year": 24, "storage_a_year": pytest.approx(7.8),
                   "a_year": pytest.approx(31.8)}


def test_a_year_of_retraining_everything():
    # 1 a task, the 12th retraining trains 12 tasks, all together 1 + 2 + ... + 12 = 78
    row = yearly(Way("all", 1800, 0, True, None), Prices(2, 0.1, 1))
    assert (row["retraining"], row["computing_a_year"]) == (12, 78)


# All together --------------------------------------------------------------------------------


def settings(**options):
    base = Config()
    return {"name": "sample", "config": base.to_dict(),
            "space": parse_space({}, base, (1, 3, 4)).to_dict(),
            "options": SearchConfig(**options).remembered(),
            "tasks": [{"name": name, "classes": ["x", "y"], "fingerprint": name,
                       "train_images": 100} for name in "ab"]}


SURVEY = {"forecast": [{"depth": depth, "probe_first": 0.6, "probe_second": 0.5, "cka_first": 0.3,
                        "cka_second": 0.2, "kept": kept, "worth_trying": kept > 0.6}
                       for depth, kept in ((1, 0.9), (3, 0.8), (4, 0.5))],
          "shifts": {"b": 0.3}, "ridge": {"1": 0.7, "3": 0.812, "4": 0.7},
          "whole_network": {"seconds_per_image": 0.01, "bytes_per_image": 1000.0},
          "held_out_images": [100, 100], "test_images": [50, 50]}


def fields(records=None, backbone="slim_resnet18", **options):
    found, saved = records or three_depths(), settings(**options)
    saved["config"]["backbone"]["backbone"] = backbone
    space = parse_space(saved["space"], Config())
    goal = Goal("tpe", 0, saved["options"]["objective"], saved["options"]["max_loss"])
    return advice_fields(saved, space, found, results_by_depth(found, goal.score), goal, SURVEY,
                         60.0)


def test_the_advice_recommends_and_explains():
    advice = fields()
    chosen = advice["recommendation"]
    assert (chosen["depth"], chosen["trial"], chosen["config_file"]) == (3, "0001", "depth-3.yaml")
    assert chosen["votes"] == {"3": 2}
    assert advice["money"] is None
    assert [each["ridge"] for each in advice["depths"]] == [0.7, 0.812, 0.7]
    assert "may be better at depth 3 by" in chosen["ridge"]
    assert advice["chance"] == 0.5
    assert chosen["above_chance"]["mean"] == pytest.approx(0.295)
    assert chosen["behind_best"]["low"] < 0 < chosen["behind_best"]["high"]
    assert [each["share_of_best"] for each in advice["depths"]] == pytest.approx(
        [1, 0.79375 / 0.8 + 0.0015625, 0.86875], abs=0.002)
    assert advice["depths"][1]["test_accuracy"]["mean"] == pytest.approx(0.75)
    assert advice["forecast"]["rank_correlation"] == pytest.approx(1)
    assert advice["more_search"]["best_so_far"][0] == [1, 0.8]


@pytest.mark.parametrize("objective", ["accuracy", "balanced", "cost"])
def test_the_page_says_what_doubt_does_where_it_does_it(objective):
    """A cheaper depth within the margin is chosen, except by the objective that asks for cost."""
    doubt = choose({1: 0.80, 3: 0.79}, {1: 8.0, 3: 2.0}, objective, 0.001, 0.02) == 3
    assert doubt is (objective != "cost")
    said = "the cheaper one is recommended" in render(fields(objective=objective))
    assert said is doubt


def test_guessing_without_the_task_counts_a_class_of_several_tasks_once():
    """As the answers do: a class that two tasks have is right whichever of them it is taken for."""
    saved = settings(unknown_task=True)
    assert HeldOut.of(saved, SURVEY).chance == 0.5
    saved["tasks"][1]["classes"] = ["y", "z"]
    assert HeldOut.of(saved, SURVEY).chance == pytest.approx(1 / 3)
    saved["tasks"][1]["classes"] = ["v", "w"]
    assert HeldOut.of(saved, SURVEY).chance == 0.25


def test_the_whole_advice_speaks_of_blocks_where_the_network_is_cut_at_blocks():
    advice = fields(backbone="partialhn:slim_resnet18", price_gpu_hour=1.0, price_gib_month=0.0)
    assert [each["freeze"] for each in advice["depths"]] == [
        "through stem", "through layer1.1", "through layer2.0"]
    page = render(advice)
    assert "each block&#x27;s features" in page
    assert "Freeze through layer1.1 (depth 3)" in page
    assert "partial hypernetwork, freezing through layer1.1" in page
    assert "each stage&#x27;s features" in render(fields())


def test_test_images_decide_nothing():
    turned = [dataclasses.replace(each, measured=dataclasses.replace(
        each.measured, test_row=(0.99, 0.99) if each.plan.depth == 4 else (0.1, 0.1)))
        if each.measured and each.plan.kind != "search" else each for each in three_depths()]
    assert fields(turned)["recommendation"]["depth"] == 3


def test_with_prices_money_is_the_cost():
    advice = fields(price_gpu_hour=3600.0, price_gib_month=0.0)
    rows = advice["money"]["rows"]
    assert [row["way"] for row in rows] == [
        "partial hypernetwork, freezing through layer3", "separate heads on the same features",
        "retrain everything"]
    # (20 s of training + 6 s of features) / 2 tasks at 1 a second; 100 images * 15 epochs * 0.01
    assert rows[0]["retraining"] == pytest.approx(13)
    assert rows[2]["retraining"] == pytest.approx(12 * 100 * 15 * 0.01)
    assert advice["recommendation"]["cost"] == "money a year"
    # storage so dear that the deepest, smallest features win
    small = [dataclasses.replace(each, measured=dataclasses.replace(
        each.measured, feature_bytes=1 << 10)) if each.measured and each.plan.depth == 4 else each
        for each in three_depths()]
    assert fields(small, price_gpu_hour=0.0, price_gib_month=100.0,
                  objective="balanced")["recommendation"]["depth"] == 4


def test_the_page_holds_everything_and_asks_for_nothing():
    hostile = three_depths()
    advice = fields(hostile, price_gpu_hour=1.0, price_gib_month=0.0)
    advice["name"] = "<img src=x>"
    advice["tasks"][0]["name"] = "</script><script>alert(1)</script>"
    page = render(advice)
    assert "<img" not in page.split("<script")[0]
    data = page.split('id="advice">')[1].split("</script>")[0]
    assert "alert(1)" in data
    assert "<script>alert" not in page
    assert "Freeze through layer3 (depth 3)" in page
    assert 'class="chosen"><th scope="row">3 ·' in page
    assert "retrain everything" in page
    assert "default-src 'none'" in page


def test_the_terminal_has_no_empty_sentence_and_shows_small_prices():
    advice = fields(price_gpu_hour=0.001, price_gib_month=0.0)
    advice["recommendation"] |= {"ridge": "", "preferred": ""}
    lines = summary(advice, "advice")
    assert lines.index("") == 1
    assert lines[2:lines.index("", 2)] == [
        advice["recommendation"][key] for key in ("reason", "confidence", "separate_heads")] + [
            advice["more_search"]["words"]]
    year = next(line for line in lines if "retrain everything" in line)
    assert float(year.split()[-1]) == pytest.approx(advice["money"]["rows"][-1]["a_year"], rel=0.05)
