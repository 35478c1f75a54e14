"""What is found in a pack, in words and on a page: from cells whose truth is known."""

import json

import pytest

from partialhn.benchmarks.comparison import rows
from pipelines.benchmarks import findings
from pipelines.benchmarks.page import KEPT, benchmark_page, kept_fields
from pipelines.cli.main import run

SHIFT = (0.0, 0.1, 0.2, 0.3, 0.4)
TRANSFORMS = ("none", "none", "solarise", "none", "blur")


def cell(strategy, depth, seed, learned, forgets=0.0, kept=0.9):
    """A cell whose tasks were learned with these accuracies and each lose `forgets` by the end."""
    matrix = [[value - forgets * (row > task) if task <= row else None
               for task, value in enumerate(learned)] for row in range(len(learned))]
    acc = sum(matrix[-1]) / len(learned)
    return {"label": strategy, "strategy": strategy, "depth": depth, "seed": seed, "acc": acc,
            "learning_accuracy": sum(learned) / len(learned), "forgetting": forgets,
            "accuracy_matrix": matrix, "bytes_per_task": 1000.0, "cpu_seconds": 2.0,
            "feature_bytes": 10,
            "tasks": [{"name": f"t<{i}>", "classes": ["a", "b"], "transform": transform}
                      for i, transform in enumerate(TRANSFORMS)],
            "task_shift": list(SHIFT), "forecast_kept": kept,
            "class_incremental": {"last": acc / 2}}


def cells(replay=0.0, sign=1):
    """Depth 4 costs a task its shift; latent replay is `replay` ahead and forgets a tenth."""
    made = []
    for seed in (0, 1, 2):
        wobble = 0.001 * seed
        shallow = [0.8 + wobble] * 5
        deep = [0.8 + wobble - sign * shift for shift in SHIFT]
        made += [cell("partial_hn", 2, seed, shallow),
                 cell("partial_hn", 4, seed, deep, kept=0.5),
                 cell("latent_replay", 2, seed, [value + replay + 0.08 + wobble
                                                 for value in shallow], 0.1)]
    return made


def test_what_depth_costs_and_why():
    made = cells()
    said = findings.how_deep(made, "stage")
    assert "most accurate with 2 stages frozen: 80.1 ± 0.2 %" in said
    assert "Going from 2 to 4 costs 20.0 ± 0.0 points." in said
    tasks = findings.task_rows(made)
    assert [round(row.lost, 6) for row in tasks] == list(SHIFT)
    said = findings.why(tasks, [2, 4], "stage")
    assert "costs task 't<4>' most (40.0 points; 40 % of the variance of its features" in said
    assert "differ more from the first lose more: rank correlation +1.00 over 4 tasks." in said


def test_no_relation_is_said_where_there_is_none():
    tasks = findings.task_rows(cells(sign=-1))
    said = findings.why(tasks, [2, 4], "stage")
    assert said.startswith("Freezing 4 stages instead of 2 costs no later task accuracy. Tasks")
    assert "do not lose more: rank correlation -1.00" in said
    assert "2 later tasks are too few" in findings.why(tasks[:3], [2, 4], "stage")
    assert findings.why(tasks, [2], "stage") == ""


def test_the_forecast_is_held_against_what_came():
    assert "in the order that was measured: 2, 4" in findings.forecast_order(cells())
    wrong = findings.forecast_order(cells(sign=-1))
    assert "in another order than was measured (4, 2): 2, 4" in wrong
    for kept in (None, 0.5):
        assert findings.forecast_order([each | {"forecast_kept": kept} for each in cells()]) == ""


def test_noise_is_told_for_both():
    said = findings.noise(cells(replay=0.05), 2, "stage")
    assert "The hypernetwork has an accuracy of 80.1 % on the corrupted tasks" in said
    assert "latent replay has an accuracy of 93.2 % on the corrupted tasks" in said
    assert "at the end 83.2 % on the clean ones (when learned: 93.2 %)" in said
    clean = [each | {"tasks": [task | {"transform": "none"} for task in each["tasks"]]}
             for each in cells()]
    assert findings.noise(clean, 2, "stage") == ""


@pytest.mark.parametrize(("replay", "words"), [
    (0.2, "latent_replay: better at depth 2 by 20."), (-0.2, "latent_replay: worse at depth 2"),
    (0.0, "latent_replay: no significant difference at depth 2")])
def test_who_is_better_as_far_as_seeds_can_tell(replay, words):
    said = findings.against(rows(cells(replay), {}))
    assert any(each.startswith(words) for each in said), said
    one = findings.against(rows([each for each in cells(replay) if each["seed"] == 0], {}))
    assert one == ["One seed does not show which is better; the table has its numbers."]


def result():
    config = {"data": {"tasks": 5, "images_per_class": 9, "input_size": 16},
              "backbone": {"backbone": "slim_resnet18", "trunk_epochs": 2, "freeze_depth": 2},
              "features": {"views": 1}, "train": {"epochs": 2, "buffer": 20}}
    return {"pack": "noisy-cifar", "size": "smoke", "config": config, "partialhn_version": "0",
            "cells": cells()}


def test_the_page_says_it_and_escapes_names(tmp_path, capsys):
    (tmp_path / "result.json").write_text(json.dumps(result()))
    target = tmp_path / "page.html"
    assert run(["report", "--pack", str(tmp_path), "--output", str(target)]) == 0
    assert str(target) in capsys.readouterr().out
    page = target.read_text()
    assert "rank correlation +1.00" in page
    assert "t&lt;4&gt;" in page
    assert "t<4>" not in page
    assert page.count("<svg") == 4
    assert "http:" not in page.replace("http://www.w3.org", "")
    assert set(KEPT) <= set(cells()[0])
    file = str(tmp_path / "result.json")
    assert run(["report", "--benchmark", file, "--output", str(target)]) == 0
    assert target.read_text() == page


def test_the_page_has_the_columns_of_the_table_and_the_command_that_was_run():
    made = result()
    made["cells"] = list(map(kept_fields, made["cells"]))
    page = benchmark_page(made)
    assert ">without the task<" in page
    assert "--size smoke --seeds 3<" in page
    early = [{key: value for key, value in each.items() if key != "class_incremental"}
             for each in cells() if each["seed"] == 0]
    page = benchmark_page(made | {"cells": list(map(kept_fields, early))})
    assert "without the task" not in page
    assert "--size smoke<" in page


def test_depths_are_stages_or_blocks_as_the_network_is_cut():
    stages, other = benchmark_page(result()), result()
    other["config"]["backbone"]["backbone"] = "timm:tf_efficientnet_lite0"
    blocks = benchmark_page(other)
    for words in ("2 {}s frozen", "Freezing 4 {}s instead", ">frozen {}s<"):
        assert words.format("stage") in stages
        assert words.format("block") in blocks
    assert "frozen stage" not in blocks


@pytest.mark.parametrize(("change", "words"), [
    ({"cells": []}, "cannot be shown as a benchmark"),
    ({"config": {}}, "cannot be shown as a benchmark"),
    ({"cells": [{"label": "naive"}]}, "cannot be shown as a benchmark")])
def test_another_file_is_refused(change, words, tmp_path, capsys):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result() | change))
    assert run(["report", "--pack", str(path), "--output", str(tmp_path / "p.html")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "p.html").exists()


def test_bad_words(tmp_path, capsys):
    assert run(["report", "--pack", str(tmp_path / "none")]) == 2
    assert "a result.json that reproduce wrote" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run(["report", "--pack", "a", "--result", "b"])
    assert "allowed: one of them" in capsys.readouterr().err


def test_the_page_keeps_every_number():
    made = benchmark_page(result())
    for value in ("80.1 ± 0.2 %", "40 %", "40.0"):
        assert value in made
