"""Tables of results say what was recorded."""

import json
import re

import pytest

from tests.docs.pages import PAGES, ROOT

GOLDEN = ROOT / "tests" / "golden"
LABELS = {"partial hypernetwork": "partial_hn", "a separate head for each task": "separate_heads",
          "joint training on all tasks so far": "joint",
          "latent replay, a memory of 200 images": "latent_replay",
          "distillation (LwF)": "lwf", "naive fine-tuning": "naive"}
PACKS = {"400 images a class": "split-cifar10", "60 images a class": "split-tiny-imagenet",
         "of 5 classes of Tiny-ImageNet": "noisy-cifar"}


def recorded(pack):
    path = GOLDEN / f"pack-{pack}-cpu.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return {(row["label"], row["depth"]): row for row in rows}


def numbers(row):
    """A recorded row as the tables write it."""
    acc, forgotten = (f"{100 * value['mean']:.1f} ± {100 * (value['mean'] - value['low']):.1f}"
                      for value in (row["acc"], row["forgetting"]))
    return [f"{acc} %", forgotten]


def table_rows(text):
    return [[cell.strip().strip("*") for cell in line.strip("|").split("|")]
            for line in text.splitlines() if line.startswith("|")]


def test_the_table_of_the_readme_is_the_recorded_benchmark():
    part = PAGES["README.md"].partition("## Results")[2].partition("\n## ")[0]
    rows = [row for row in table_rows(part) if row[0] in LABELS]
    assert [row[0] for row in rows] == list(LABELS)
    found = recorded("split-cifar10")
    for label, *cells in rows:
        assert cells[:2] == numbers(found[LABELS[label], 3])


@pytest.mark.parametrize("title", PACKS)
def test_the_tables_of_results_are_the_recorded_benchmarks(title):
    page = PAGES["docs/results.md"]
    part = re.search(rf"^### [^\n]*{re.escape(title)}\n(.*?)(?=^##)", page, re.S | re.M)[1]
    found = recorded(PACKS[title])
    rows = [row for row in table_rows(part) if len(row) == 8 and row[1].isdigit()]
    assert len(rows) == len(found)
    for strategy, depth, acc, _, forgotten, *_ in rows:
        assert [acc, forgotten] == numbers(found[strategy, int(depth)])
