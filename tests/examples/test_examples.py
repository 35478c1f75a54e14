"""Every example runs as its page says, and is short."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import partialhn as phn

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "notebook.ipynb"


def run(name, folder, *arguments):
    done = subprocess.run([sys.executable, EXAMPLES / name, *map(str, arguments)], cwd=folder,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short_and_listed(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 40
    assert f"`{path.name}`" in (EXAMPLES / "README.md").read_text(encoding="utf-8")


def test_digits(tmp_path):
    printed = run("digits.py", tmp_path)
    assert "task '4' (5 of 5): accuracy" in printed
    assert "forgetting 0.0%" in printed
    assert (tmp_path / "digits-stream" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    model = phn.Predictor.load(tmp_path / "digits-stream" / "model")
    assert model.tasks == ["0", "1", "2", "3", "4"]


def test_own_images(tmp_path):
    printed = run("own_images.py", tmp_path)
    assert len(list((tmp_path / "own-images" / "train").glob("digit-*/*.png"))) == 720
    assert "probability" in printed
    assert "000.png" in printed


def test_own_images_makes_none_where_a_folder_is_named(tmp_path):
    done = subprocess.run([sys.executable, EXAMPLES / "own_images.py", "typo"], cwd=tmp_path,
                          capture_output=True, text=True, check=False)
    assert "No such file or directory: 'typo/train'" in done.stderr
    assert not (tmp_path / "typo").exists()


def cells():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def last_value(source, scope):
    """Runs a cell as a notebook does; returns the value of its last expression."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, NOTEBOOK.name, "exec"), scope)
    return eval(compile(ast.Expression(last.value), NOTEBOOK.name, "eval"), scope) if last else None


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope, shown = {}, []
    for cell in cells():
        value = last_value("".join(cell["source"]), scope)
        shown.append([kind for kind in ("_repr_html_", "_repr_png_")
                      if hasattr(value, kind) and getattr(value, kind)()])
    assert scope["stream"].learned == ["0", "1", "2", "3", "4"]
    assert ["_repr_png_"] in shown
    assert shown.count(["_repr_html_"]) >= 5


def test_the_notebook_is_kept_with_what_it_showed():
    for cell in cells():
        kinds = {kind for output in cell["outputs"] for kind in output.get("data", {})}
        assert kinds, cell["source"]
        assert all(output["output_type"] != "error" for output in cell["outputs"])
    kept = NOTEBOOK.read_text(encoding="utf-8")
    assert "image/png" in kept
    assert len(kept) < 300_000
    assert str(ROOT) not in kept


def test_add_a_strategy(tmp_path):
    printed = run("add_a_strategy.py", tmp_path)
    assert "after task" in printed
