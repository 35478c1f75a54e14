"""Who may import whom: read from the sources, so nothing can be forgotten."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

LIBRARY = [
    {"__init__", "errors"},
    {"config", "batch", "cache"},
    {"codec", "columns", "arithmetic"},
    {"backbone", "hypernet", "metrics", "stream", "corruptions", "conversions", "views", "presets",
     "seeds"},
    {"parts", "packs", "comparison", "drifting"},
    {"readers"},
    {"datasets", "model", "store"},
    {"strategies.base", "task_inference"},
    {"strategies.naive", "strategies.partial_hn", "strategies.separate_heads",
     "strategies.linear_probe"},
    {"strategies.rehearsal", "strategies.ewc", "strategies.lwf"},
    {"strategies.joint", "strategies.latent_replay"},
    {"strategies", "batches"},
    {"inference_metrics", "steps"},
    {"featurise", "train", "forecast"},
    {"checkpoint", "slots", "probe", "plan"},
    {"pretrain", "result"},
    {"chain"},
    {"predict", "run"},
    {"sample", "reproduce"},
]
"""Modules of partialhn, lowest first: a file imports from lower rows only."""

PACKAGES = ("advice", "cli", "features", "packs", "registry", "report", "retrain", "search",
            "serving", "stages", "upkeep")

PIPELINES = [
    {"__init__", *PACKAGES},
    {"settings", "progress", "cluster", "registry.matrix", "registry.versions", "retrain.gate",
     "retrain.outcome", "search.packing", "search.space", "advice.money", "stages.events"},
    {"search.settings"},
    {"files"},
    {"s3"},
    {"storage"},
    {"data", "lease", "registry.pyfunc_model", "registry.package", "registry.connection",
     "registry.history", "retrain.inbox", "search.state", "stages.states"},
    {"registry.runs", "registry.aliases", "retrain.journal", "retrain.validate",
     "features.in_use", "stages.task_share"},
    {"registry.client", "search.runs"},
    {"upkeep.references"},
    {"upkeep.prune"},
    {"features.produce", "search.sampling", "search.stopping", "search.checks", "advice.decide"},
    {"features.on_ray", "stages.worker", "search.trial", "advice.words", "upkeep.inspect"},
    {"stages.worker_ray", "stages.worker_process", "stages.base", "search.survey",
     "advice.facts"},
    {"stages.on_ray", "stages.in_process"},
    {"stages.choose"},
    {"report.charts"},
    {"report.facts", "report.html"},
    {"report.auto", "report.cost", "report.provenance", "report.tasks", "report.verdict"},
    {"report.text"},
    {"report.page"},
    {"train", "advice.page"},
    {"serving.live"},
    {"serving.drift", "serving.model", "predict", "show", "registry.models", "registry.verify",
     "retrain.held", "search.results"},
    {"registry.models_text", "retrain.candidate", "serving.http", "search.run", "doctor"},
    {"retrain.learning", "retrain.publish", "serving.app"},
    {"retrain.run"},
    {"packs.findings"},
    {"packs.table", "packs.plots"},
    {"packs.page"},
    {"cli.retrain", "cli.models", "cli.serve", "cli.tune", "cli.features", "cli.doctor",
     "cli.reproduce"},
    {"demo"},
    {"cli.main"},
]

RESTRICTED = {"mlflow": {f"pipelines.registry.{name}" for name in (
                  "client", "runs", "aliases", "package", "connection", "pyfunc_model", "verify")},
              "boto3": {"pipelines.s3"}, "botocore": {"pipelines.s3"}}
"""The only files that may import a package."""

FORBIDDEN_IN_LIBRARY = {"ray", "mlflow", "boto3", "botocore", "pipelines"}
FREE_WHILE_LOADING = ("torch", "torchvision", "ray", "mlflow", "boto3", "sklearn", "pandas")


def sources(package):
    """Module name -> syntax tree of every file of a package."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts if parts[-1] != "__init__" or len(parts) == 2 else parts[:-1])
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


SOURCES = sources("partialhn") | sources("pipelines")


def imported(name):
    """Dotted names that a file imports, anywhere in it: modules, and what is taken from them."""
    for node in ast.walk(SOURCES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import in line {node.lineno}"
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


def module_of(dotted):
    """The module of ours that a dotted name stands for, or None."""
    parts = dotted.split(".")
    if parts[0] not in ("partialhn", "pipelines"):
        return None
    for end in (len(parts), len(parts) - 1):
        name = ".".join(parts[:end])
        if name in SOURCES:
            return name
    assert len(parts) <= 2, f"there is no module {dotted}"
    return f"{parts[0]}.__init__"


def rank(name, table):
    short = name.partition(".")[2]
    ranks = [index for index, row in enumerate(table) if short in row]
    assert ranks, f"{name} is in no layer; list it in tests/unit/test_layers.py"
    return ranks[0]


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_a_file_imports_from_lower_layers_only(name):
    package = name.partition(".")[0]
    table = LIBRARY if package == "partialhn" else PIPELINES
    own = rank(name, table)
    for dotted in imported(name):
        other = module_of(dotted)
        if other is None or not other.startswith(f"{package}."):
            continue
        assert rank(other, table) < own, f"{name} imports {other}"


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_packages_stay_where_they_belong(name):
    roots = {dotted.partition(".")[0] for dotted in imported(name)}
    if name.startswith("partialhn"):
        assert not roots & FORBIDDEN_IN_LIBRARY
    for package, allowed in RESTRICTED.items():
        # TYPE_CHECKING blocks count too: a name in an annotation is a dependency as well
        assert package not in roots or name in allowed, f"{name} imports {package}"


def test_every_listed_file_exists():
    listed = ({f"partialhn.{name}" for row in LIBRARY for name in row}
              | {f"pipelines.{name}" for row in PIPELINES for name in row})
    assert listed - SOURCES.keys() == set()


PROBE = """
import os, sys
EVENTS = ("os.putenv", "os.unsetenv", "os.mkdir", "socket.connect", "subprocess.Popen")
OURS = tuple(os.path.join(os.getcwd(), package, "") for package in ("partialhn", "pipelines"))
touched = []
def watch(event, args):
    if event not in EVENTS:
        return
    frame = sys._getframe()
    while frame:
        name = frame.f_code.co_filename
        if name.startswith(OURS):
            touched.append((event, args, name))
        if "site-packages" in name:
            break  # a library's own doing
        frame = frame.f_back
sys.addaudithook(watch)
sys.dont_write_bytecode = True
import {module}
assert not touched, touched
heavy = [name for name in {heavy!r} if name in sys.modules]
assert not heavy, heavy
"""


def probe(modules, heavy):
    code = PROBE.format(module=", ".join(modules), heavy=heavy)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                          check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_command_line_is_light_and_starts_nothing():
    modules = ["partialhn", "partialhn.config", "partialhn.presets", "partialhn.packs",
               "pipelines.settings", "pipelines.cli.main"]
    probe([name for name in modules if name in SOURCES or f"{name}.__init__" in SOURCES],
          FREE_WHILE_LOADING)


def test_importing_the_whole_library_starts_nothing():
    probe(sorted(name.removesuffix(".__init__") for name in SOURCES
                 if name.startswith("partialhn")), ("ray", "mlflow", "boto3", "torchvision"))


def test_what_every_process_of_a_cluster_imports_is_as_light_as_it_can_be():
    probe(["pipelines.stages.worker_ray"], ("mlflow", "boto3", "torchvision", "pandas", "sklearn"))
    probe(["pipelines.stages.events"], (*FREE_WHILE_LOADING, "numpy", "pyarrow"))


def test_the_probe_notices(tmp_path):
    (tmp_path / "partialhn").mkdir()
    (tmp_path / "partialhn" / "__init__.py").write_text("import os\nos.environ['A'] = 'b'\n")
    done = subprocess.run([sys.executable, "-c", PROBE.format(module="partialhn", heavy=())],
                          capture_output=True, text=True, cwd=tmp_path, check=False)
    assert "os.putenv" in done.stderr
