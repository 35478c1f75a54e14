"""Documents for people: what they name exists, and the files that other tools read parse."""

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest
import yaml

import partialhn

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md", ROOT / "changes/README.md",
                 ROOT / "docs/compatibility.md", ROOT / "docs/upgrading.md",
                 *(ROOT / "docs/design").glob("*.md"), *(ROOT / "docs/measurements").glob("*.md")])
TOP = ("partialhn", "pipelines", "tests", "docs", "infra", "examples", "changes", "findings",
       ".github", ".ci")
PATH = re.compile(rf"`(?:python )?((?:{'|'.join(map(re.escape, TOP))})/[\w./*-]*)[^`]*`")
MODULE = re.compile(r"`((?:partialhn|pipelines)(?:\.\w+)+)`")
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)(?:#[^)]*)?\)")
FRAGMENT = re.compile(r"[a-z0-9][a-z0-9-]*\.([a-z]+)(?:\.\d+)?\.md")
PLACEHOLDER = "NAME"
GROUPS = {group for path in (ROOT / "partialhn").rglob("*.py") for group in re.findall(
    r"\"(partialhn\.[a-z_]+s)\"", path.read_text(encoding="utf-8"))}
"""Groups of entry points that the library reads."""


def text_of(document):
    return (ROOT / document).read_text(encoding="utf-8")


def now(text):
    """The text without the first column of tables that is headed "before": names that are gone."""
    kept, gone = [], False
    for line in text.splitlines():
        if line.startswith("| before |"):
            gone = True
        elif not line.startswith("|"):
            gone = False
        kept.append(line.split("|", 2)[2] if gone else line)
    return "\n".join(kept)


def exists(path):
    return any(ROOT.glob(path)) if "*" in path else (ROOT / path).exists()


def module_exists(dotted):
    """Whether a dotted name is a module, what a module defines, or a group of entry points."""
    parts = dotted.split(".")
    if (parts[0] == "partialhn" and parts[1] in partialhn.__all__) or dotted in GROUPS:
        return True
    for end in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:end])
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.exists():
                defined = re.compile(rf"^\s*(?:def|class)? ?\"?{parts[end]}\b", re.M) if (
                    end < len(parts)) else None
                return defined is None or bool(defined.search(file.read_text(encoding="utf-8")))
    return False


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_named_in_a_document_exist(document):
    missing = [path for path in PATH.findall(text_of(document))
               if PLACEHOLDER not in path and not exists(path)]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS)
def test_modules_named_in_a_document_exist(document):
    missing = [name for name in MODULE.findall(now(text_of(document))) if not module_exists(name)]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_of_a_document_lead_somewhere(document):
    folder = (ROOT / document).parent
    missing = [link for link in LINK.findall(text_of(document)) if not (folder / link).exists()]
    assert not missing


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if name.startswith("docs/")])
def test_links_of_the_site_stay_in_it(document):
    folder = (ROOT / document).parent
    for link in LINK.findall(text_of(document)):
        assert (folder / link).resolve().is_relative_to(ROOT / "docs"), link


def test_the_documents_are_there():
    assert len(DOCUMENTS) > 25
    named = [path for name in DOCUMENTS for path in PATH.findall(text_of(name))]
    assert len(set(named)) > 80, "the pattern finds paths no more"


def test_the_checks_notice_names_that_are_gone():
    assert not exists("partialhn/featurise.py")
    assert not module_exists("partialhn.training.lineage.prefixes_of")
    assert module_exists("partialhn.training.lineage.lineage_ids_of")
    table = "| before | now |\n|---|---|\n| `partialhn.train` | `partialhn.gone` |\n"
    assert MODULE.findall(now(table)) == ["partialhn.gone"]


def boxes(package, rows):
    """The layers of a package as a tower of boxes, the lowest last."""
    texts = ["  ".join(row.split()) for row in reversed(rows)]
    width = max(map(len, texts))
    line = f"+{'-' * (width + 2)}+"
    return [f"{package}/".ljust(len(line)), line,
            *(part for text in texts for part in (f"| {text.ljust(width)} |", line))]


def drawing(layers):
    left, right = (boxes(package, layers[package]) for package in ("pipelines", "partialhn"))
    width, start = len(left[0]), len(left)
    arrow = ["|", "|   imports", "+" + "-" * (width - 3) + ">"]
    left += [(" " * 6 + part).ljust(width) for part in arrow]
    left += [" " * width] * (len(right) - len(left))
    assert len(right) >= start + len(arrow)
    return [f"{a.ljust(width + 5)}{b}".rstrip() for a, b in zip(left, right, strict=True)]


def test_the_drawing_of_the_layers_is_that_of_the_layers():
    spec = importlib.util.spec_from_file_location("layers", ROOT / "tests/unit/test_layers.py")
    layers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(layers)
    block = text_of("ARCHITECTURE.md").partition("## Layers")[2].split("```")[1]
    wanted = "\n".join(drawing(layers.LAYERS))
    assert block.strip("\n") == wanted, f"ARCHITECTURE.md must hold this drawing:\n{wanted}"


def test_architecture_is_short_enough_to_be_read():
    assert len(text_of("ARCHITECTURE.md").splitlines()) <= 160


@pytest.mark.parametrize("name", ["docs/measurements", "docs/design"])
def test_every_page_stands_in_its_index(name):
    index = text_of(f"{name}/README.md")
    pages = {path.name for path in (ROOT / name).glob("*.md")} - {"README.md"}
    assert pages == {link for link in LINK.findall(index) if "/" not in link}


def test_the_citation_has_what_its_format_asks_for():
    fields = yaml.safe_load(text_of("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= fields.keys()
    assert fields["version"] == partialhn.__version__
    assert fields["license"] == tomllib.loads(text_of("pyproject.toml"))["project"]["license"]
    for reference in fields["references"]:
        assert {"type", "title", "authors"} <= reference.keys()


@pytest.mark.parametrize("path", [".pre-commit-config.yaml", ".github/ISSUE_TEMPLATE/bug.yml",
                                  ".github/ISSUE_TEMPLATE/config.yml"])
def test_a_yaml_file_parses(path):
    assert isinstance(yaml.safe_load(text_of(path)), dict)


def test_hooks_use_tools_that_make_setup_installs():
    hooks = yaml.safe_load(text_of(".pre-commit-config.yaml"))["repos"][0]["hooks"]
    assert {hook["id"] for hook in hooks} == {"ruff", "mypy", "documents"}
    assert all(hook["entry"].startswith(".venv/bin/") for hook in hooks)


def test_the_bug_form_asks_for_what_doctor_prints():
    form = yaml.safe_load(text_of(".github/ISSUE_TEMPLATE/bug.yml"))
    asked = {part["id"]: part for part in form["body"] if "id" in part}
    assert asked["doctor"]["validations"]["required"]
    assert "partialhn doctor" in asked["doctor"]["attributes"]["description"]


def kinds():
    settings = tomllib.loads(text_of("pyproject.toml"))["tool"]["towncrier"]
    return {kind["directory"]: kind["name"] for kind in settings["type"]}


def test_the_changelog_has_versions_newest_first_with_known_headings():
    text = text_of("CHANGELOG.md")
    versions = re.findall(r"^## (.+)$", text, re.M)
    numbers = []
    for version in versions:
        match = re.fullmatch(r"(\d+)\.(\d+)\.(\d+) \((unreleased|\d{4}-\d\d-\d\d)\)", version)
        assert match, version
        numbers.append(tuple(map(int, match.groups()[:3])))
    assert numbers == sorted(set(numbers), reverse=True)
    assert ".".join(map(str, numbers[0])) == partialhn.__version__
    assert set(re.findall(r"^### (.+)$", text, re.M)) <= set(kinds().values())
    assert "<!-- towncrier release notes start -->" in text


def test_changelog_entries_are_lists_of_sentences():
    body = text_of("CHANGELOG.md").partition("### ")[2]
    for entry in re.findall(r"^- (.+(?:\n  .+)*)", body, re.M):
        assert entry[0].isupper() or entry[0] == "`", entry
        assert entry.endswith("."), entry


def fragments():
    return sorted(path for path in (ROOT / "changes").iterdir()
                  if path.name not in ("README.md", "template.md.jinja"))


def test_every_changelog_fragment_has_a_known_kind_and_plain_sentences():
    for path in fragments():
        match = FRAGMENT.fullmatch(path.name)
        assert match, f"{path.name}; allowed: NAME.KIND.md"
        assert match[1] in kinds(), f"{path.name}; allowed kinds: {', '.join(kinds())}"
        text = path.read_text(encoding="utf-8").strip()
        assert text.endswith("."), path.name
        assert not re.search(r"^(#|[-*] )", text, re.M), f"{path.name}: sentences, no list"
        assert len(text) <= 600, path.name


def test_the_table_of_kinds_is_the_configured_one():
    rows = re.findall(r"^\| `(\w+)` \|", text_of("changes/README.md"), re.M)
    assert rows == list(kinds())
