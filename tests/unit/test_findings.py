"""The scripts of findings/ keep their form: head, pinned packages, temporary folder, table row."""

import os
import re
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "findings"
SCRIPTS = sorted(FOLDER.glob("*.sh"))
FIELDS = ("Software", "Expected", "Seen", "Matters", "Another version")

PINNED = re.compile(r'  "[a-z0-9-]+(\[[a-z]+\])?==\$\{([A-Z0-9]+_VERSION):-\d+(\.\d+)+\}"')
"""A package at an exact version, which an environment variable replaces."""


def head(text):
    """Field -> its text, of the comment at a script's head."""
    first, *lines = text.split("\nset -euo pipefail\n")[0].splitlines()
    assert first == "#!/usr/bin/env bash"
    fields = {}
    for line in lines:
        begins = re.fullmatch(r"# ([A-Z][A-Za-z ]+): (.+)", line)
        if begins:
            name = begins[1]
            assert name not in fields, f"two lines {name!r}"
            fields[name] = begins[2]
        else:
            assert line.startswith("#   "), f"neither a field nor the rest of one: {line!r}"
            fields[name] += " " + line.lstrip("# ")
    return fields


def test_there_are_scripts():
    assert len(SCRIPTS) >= 8
    others = {path.name for path in FOLDER.iterdir()} - {path.name for path in SCRIPTS}
    assert others == {"README.md"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_script_can_be_run_by_hand(script):
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    compile(re.search(r"<< 'PYTHON'\n(.*)\nPYTHON\n", script.read_text(encoding="utf-8"),
                      re.DOTALL)[1], script.name, "exec")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_head_says_what_is_expected_and_what_happens(script):
    text = script.read_text(encoding="utf-8")
    fields = head(text)
    assert tuple(fields) == FIELDS
    variables = re.findall(r"(\w+_VERSION)=\S+", fields["Another version"])
    assert variables
    assert all(f"${{{name}:-" in text for name in variables)
    assert fields["Another version"].endswith(f" findings/{script.name}")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_packages_are_pinned_and_named_in_the_head(script):
    text = script.read_text(encoding="utf-8")
    packages = re.search(r"packages=\(\n(.+?)\n\)\n", text, re.DOTALL)[1].splitlines()
    assert packages
    assert all(PINNED.fullmatch(line) for line in packages), packages
    version = re.search(r":-([\d.]+)\}", packages[0])[1]
    assert version in head(text)["Software"]
    assert "partialhn" not in text
    assert "pipelines" not in text


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_script_works_in_a_temporary_folder_and_ends_with_a_verdict(script):
    text = script.read_text(encoding="utf-8")
    order = ["set -euo pipefail\n", "folder=$(mktemp -d)\n", "trap 'rm -rf \"$folder\"' EXIT\n",
             'cd "$folder"\n', "<< 'PYTHON'\n", "raise SystemExit(None if same else "]
    places = [text.find(line) for line in order]
    assert -1 not in places
    assert places == sorted(places)


def test_table_lists_every_script_once():
    rows = re.findall(r"^\| \[(\w+\.sh)\]\((\w+\.sh)\) \| ([^|]+) \| [^|]+ \| [^|]+ \|$",
                      (FOLDER / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(name for name, _, _ in rows) == [path.name for path in SCRIPTS]
    for name, link, software in rows:
        assert name == link
        for version in re.findall(r"\d+(?:\.\d+)+", software):
            assert version in head((FOLDER / name).read_text(encoding="utf-8"))["Software"]
