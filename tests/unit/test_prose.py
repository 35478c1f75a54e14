"""Docstrings and names that a stranger understands: rules that hold for every source file."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for package in ("partialhn", "pipelines")
                 for path in (ROOT / package).rglob("*.py"))

VERBS = {"is", "was", "are", "were", "be", "been", "do", "does", "did", "done", "has", "had",
         "have", "can", "could", "may", "might", "must", "shall", "should", "will", "would",
         "came", "come", "made", "kept", "said", "took", "went", "left", "held"}
"""Verb forms that a third person s or an -ed does not show."""
NO_VERBS = {"this", "its", "images", "classes", "features", "tasks", "less", "stored", "learned"}
"""Words with such an ending that are no verb after "What"."""
NAMES = {"there", "made", "told"}


def begins_badly(text):
    """Whether a docstring begins with "Of", or with "What" and a verb: neither names a noun."""
    words = re.findall(r"[A-Za-z]+", text.split("\n\n")[0])[:2]
    if words[:1] == ["Of"]:
        return True
    return len(words) == 2 and words[0] == "What" and not text.split("\n\n")[0].endswith("?") and (
        words[1] in VERBS or (bool(re.fullmatch(r"[a-z]+(s|ed)", words[1]))
                              and words[1] not in NO_VERBS))


def docstrings(tree):
    """Every string that stands alone as a statement: docstrings, and those under fields."""
    for node in ast.walk(tree):
        if (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)):
            yield node.lineno, node.value.value


def names(tree):
    """Every argument and every local variable."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_name_a_thing_and_variables_are_nouns(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    bad = [f"line {line}: {text.splitlines()[0]}" for line, text in docstrings(tree)
           if begins_badly(text)]
    bad += [f"line {line}: variable {name}" for line, name in names(tree) if name in NAMES]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(("text", "bad"), [
    ("Of the task's data.", True), ("What is learned, on disk.", True),
    ("What a run measured.", False), ("What makes the shards.", True),
    ("What computed them.", True), ("What this is.", False), ("Offsets of rows.", False),
    ("The features of a task.", False), ("What is new?", False)])
def test_the_rule_tells_them_apart(text, bad):
    assert begins_badly(text) == bad
