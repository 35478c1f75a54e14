"""Packs: what is in them, and the smoke size of one on real photographs."""

import csv
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from partialhn.benchmarks.catalogue import BENCHMARKS, EVERY, Cell, expected, find_benchmark
from partialhn.benchmarks.reproduce import _for_each, config_of
from partialhn.errors import InputError
from partialhn.presets import PRESETS
from pipelines.cli.main import Train, run
from pipelines.cli.reproduce import Reproduce

DATA = os.environ.get("PARTIALHN_TEST_DATA")


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize("size", ["smoke", "cpu", "full"])
def test_every_strategy_is_in_every_size(name, size):
    pack = find_benchmark(name)
    cells = pack.cells(size)
    own = pack.config(size, "DATA").backbone.freeze_depth
    assert {cell.strategy for cell in cells if cell.depth == own} == set(
        pack.sizes[size].strategies)
    assert len({cell.name for cell in cells}) == len(cells)
    first = pack.cells(size, 1)
    assert cells[:len(first)] == first
    assert len(pack.cells(size, 7)) == 7 * len(first)
    known = {f"{cell.label}@{cell.depth}" for cell in cells}
    assert set(expected(name, size)) <= known


def test_the_help_names_every_benchmark_and_every_preset():
    assert all(name in " ".join((Reproduce.__doc__ or "").split()) for name in BENCHMARKS)
    assert all(name in " ".join((Train.__doc__ or "").split()) for name in PRESETS)


def test_a_smaller_size_is_the_first_tasks_of_the_same_kind():
    small = find_benchmark("split-tiny-imagenet").config("cpu", "DATA").data
    assert (small.tasks, small.classes, small.data) == (5, 50, "DATA")
    full = find_benchmark("split-tiny-imagenet").config("full", "DATA").data
    assert (full.tasks, full.classes, full.images_per_class) == (20, None, None)


def test_depth_0_has_the_names_of_the_literature():
    assert [Cell(strategy, 0, 0).label for strategy in ("partial_hn", "latent_replay", "naive")
            ] == ["full_hn", "er", "naive"]


def test_a_cell_has_its_strategy_depth_and_seed():
    base = find_benchmark("split-cifar10").config("cpu", "DATA")
    for depth, start in ((0, "previous"), (3, "first")):
        config = config_of(base, Cell("naive", depth, 5))
        assert (config.backbone.freeze_depth, config.train.strategy, config.train.seed) == (
            depth, "naive", 5)
        assert config.hypernet.starts_from == start


@pytest.mark.parametrize(("words", "message"), [
    (["split-cifar11"], "benchmark is 'split-cifar11'; allowed: split-cifar10"),
    (["split-cifar10", "--seeds", "0"], "seeds is 0; allowed: 1 or more"),
    (["split-cifar10", "--threads", "0"], "threads is 0; allowed: 1 or more"),
])
def test_bad_input_is_named(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(["reproduce", *words, "--data", "nowhere"])
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there(capsys):
    words = ["reproduce", "split-cifar10", "--data", "digits", "--device", "gpu"]
    assert run([*words, "--out", "unused"]) == 2
    assert "CUDA finds no GPU on this machine" in capsys.readouterr().err


def test_an_unknown_pack():
    with pytest.raises(InputError, match="allowed: split-cifar10, split-cifar100"):
        find_benchmark("cifar")


@pytest.mark.skipif(not DATA, reason="PARTIALHN_TEST_DATA is not set: the folder of image sets")
def test_smoke_on_photographs_goes_on_where_it_stopped(tmp_path, capsys):
    words = ["reproduce", "noisy-cifar", "--data", str(Path(DATA) / "tiny-imagenet-32"),
             "--out", str(tmp_path / "out")]
    assert run(words) == 0
    first = capsys.readouterr().out
    assert "no earlier run of this size is recorded" in first
    table = list(csv.DictReader((tmp_path / "out" / "table.csv").read_text().splitlines()))
    assert {row["strategy"] for row in table if row["depth"] == "3"} == set(EVERY)
    assert all(0 <= float(row["class_incremental"]) <= 1 for row in table)
    svg = (tmp_path / "out" / "plots.svg").read_text()
    assert "forgotten, points" in svg
    assert "partial_hn" in svg
    cells = sorted((tmp_path / "out" / "cells").rglob("*.json"))
    assert len(cells) == len(find_benchmark("noisy-cifar").cells("smoke"))
    kept = {path: path.read_bytes() for path in cells[2:]}
    lost = [json.loads(path.read_text()) for path in cells[:2]]
    for path in cells[:2]:
        path.unlink()
    assert run([*words, "--at-once", "2"]) == 0
    assert " 0 images decoded" in capsys.readouterr().out
    for path, fields in zip(cells, lost, strict=False):
        assert json.loads(path.read_text())["accuracy_matrix"] == fields["accuracy_matrix"]
    assert {path: path.read_bytes() for path in kept} == kept


def test_ctrl_c_ends_cells_that_are_learned_at_once():
    """Also those that would go on for minutes; a cell that waits is not begun."""
    both, begun, said = threading.Barrier(2, timeout=60), [], []

    def learn(cell, go_on):
        begun.append(cell)
        if cell == "finished":
            return
        both.wait()
        if cell == "last":
            os.kill(os.getpid(), signal.SIGINT)
        for _ in range(6000):
            go_on()
            time.sleep(0.01)

    # a shell that starts the tests in the background has them ignore Ctrl-C
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            _for_each(["finished", "first", "last", "waits"], learn, 2, torch.device("cpu"),
                      said.append)
    finally:
        signal.signal(signal.SIGINT, before)
    assert begun == ["finished", "first", "last"]
    assert len(said) == 1
    assert said[0].startswith("stopping: the 2 cells that are being learned end with their epoch")
