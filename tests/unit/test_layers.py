"""Who may import whom: rules about folders, read from the sources, so no file can be forgotten."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

LAYERS = {
    "partialhn": ("errors naming numbers", "environment plugins", "folders tables yaml_text",
                  "config json_files pixels", "data networks presets", "features",
                  "detector", "strategies task_inference", "checkpoints", "predict",
                  "evaluation export", "training", "run", "benchmarks notebook"),
    "pipelines": ("settings", "gate platform", "report", "features registry benchmarks",
                  "search execution doctor show serving",
                  "label_images export_model advice train retrain",
                  "tune upkeep demo register_stream", "cli"),
}
"""The folders (and the files beside them) of each package, lowest row first. A file imports from
its own folder and from lower rows only. `tables` are the files table.py of all library folders:
they import nothing heavy, so that options can list what they name."""

HOME = {"mlflow": "pipelines.registry", "boto3": "pipelines.platform",
        "botocore": "pipelines.platform"}
"""The only folder that may import a package."""

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


def folder_of(name):
    """The folder of a module, or the module itself where it lies beside the folders."""
    if name.startswith("partialhn.") and name.endswith(".table"):
        return "tables"
    return name.split(".")[1]


def row_of(package, folder):
    rows = [index for index, row in enumerate(LAYERS[package]) if folder in row.split()]
    assert rows, f"{package}/{folder} is in no layer; name it in tests/unit/test_layers.py"
    return rows[0]


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_a_file_imports_from_its_folder_and_from_lower_layers_only(name):
    package, own = name.partition(".")[0], folder_of(name)
    for dotted in imported(name):
        other = module_of(dotted)
        if other is None or not other.startswith(f"{package}."):
            continue
        folder = folder_of(other)
        if own == "__init__":
            continue  # the front door names what it opens to, and imports it when asked
        if folder not in (own, "__init__"):
            assert row_of(package, folder) < row_of(package, own), f"{name} imports {other}"


def test_no_import_goes_round():
    graph = {name: {other for other in map(module_of, imported(name)) if other and other != name}
             for name in SOURCES if not name.endswith("__init__")}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize("package", sorted(LAYERS))
def test_every_folder_has_one_place(package):
    rows = " ".join(LAYERS[package]).split()
    folders = {folder_of(name) for name in SOURCES if name.startswith(f"{package}.")}
    assert sorted(rows) == sorted(folders - {"__init__"})


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_packages_stay_where_they_belong(name):
    roots = {dotted.partition(".")[0] for dotted in imported(name)}
    if name.startswith("partialhn"):
        assert not roots & FORBIDDEN_IN_LIBRARY
    for package, folder in HOME.items():
        # TYPE_CHECKING blocks count too: a name in an annotation is a dependency as well
        assert package not in roots or name.startswith(folder), f"{name} imports {package}"


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
    modules = ["partialhn", "partialhn.config", "partialhn.presets",
               "partialhn.benchmarks.catalogue",
               "pipelines.settings", "pipelines.cli.main"]
    probe([name for name in modules if name in SOURCES or f"{name}.__init__" in SOURCES],
          FREE_WHILE_LOADING)


def test_importing_the_whole_library_starts_nothing():
    probe(sorted(name.removesuffix(".__init__") for name in SOURCES
                 if name.startswith("partialhn")), ("ray", "mlflow", "boto3", "torchvision"))


def test_what_every_process_of_a_cluster_imports_is_as_light_as_it_can_be():
    probe(["pipelines.execution.on_ray"], ("mlflow", "boto3", "torchvision", "pandas", "sklearn"))
    probe(["pipelines.execution.events"], (*FREE_WHILE_LOADING, "numpy", "pyarrow"))


def test_the_probe_notices(tmp_path):
    (tmp_path / "partialhn").mkdir()
    (tmp_path / "partialhn" / "__init__.py").write_text("import os\nos.environ['A'] = 'b'\n")
    done = subprocess.run([sys.executable, "-c", PROBE.format(module="partialhn", heavy=())],
                          capture_output=True, text=True, cwd=tmp_path, check=False)
    assert "os.putenv" in done.stderr
