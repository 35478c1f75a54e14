"""Tables of strategies, backbones and data forms, and what other packages add to them."""

import json
import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from partialhn.config import BackboneConfig, Config, FeatureDtype, TrainConfig
from partialhn.data.table import FORMS, converted_folder
from partialhn.errors import InputError
from partialhn.features.codec import DTYPES
from partialhn.networks.backbone import build_network
from partialhn.networks.table import BACKBONES
from partialhn.strategies import STRATEGIES
from partialhn.strategies.table import OWN, TABLE, label_of, needs_every_task, register_strategy
from partialhn.training.lineage import BASELINE_OPTIONS

ROOT = Path(__file__).parents[2]
CODE = '''
import sys
from partialhn.data.library import convert_digits
from partialhn.networks.slim_resnet18 import SLIM_RESNET18 as SMALL
from partialhn.strategies.shared_head import SharedHead
class Mine(SharedHead):
    label = "My strategy"
def form(argument, cache_dir):
    print("form", argument)
    return convert_digits(cache_dir)
'''
POINTS = """[partialhn.strategies]
my_strategy = my_plugin:Mine
[partialhn.backbones]
my_backbone = my_plugin:SMALL
[partialhn.data]
my_form = my_plugin:form
"""
SMALL = ["--tasks", "2", "--task-sizes", "2", "2", "--classes", "4", "--input-size", "16",
         "--trunk-epochs", "1", "--epochs", "1", "--views", "1", "--augment", "none",
         "--images-per-class", "40", "--threads", "1"]


def install(folder, points=POINTS, name="my-plugin"):
    """A real distribution as pip leaves it: its metadata and its module."""
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(points)
    (folder / "my_plugin.py").write_text(CODE)


def python(folder, *words):
    paths = os.pathsep.join([str(folder), str(ROOT)])
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=folder,
                          check=False, env={**os.environ, "PYTHONPATH": paths})


@pytest.fixture
def registered():
    names = []

    def register(name, source):
        register_strategy(name, source)
        names.append(name)
    yield register
    for name in names:
        TABLE.unregister(name)


def test_an_installed_package_adds_a_strategy_a_backbone_and_a_data_form(tmp_path):
    install(tmp_path)
    done = python(tmp_path, "-c", "from pipelines.cli.main import main; main()", "train",
                  "--data", "my_form:given",
                  "--strategy", "my_strategy", "--backbone", "my_backbone", *SMALL)
    assert done.returncode == 0, done.stderr
    assert "form given" in done.stdout
    assert json.loads((tmp_path / "result.json").read_text())["strategy"] == "my_strategy"
    code = ("from pathlib import Path; import partialhn as phn; from partialhn.config import *; "
            "r = phn.run_stream(phn.Config(DataConfig(data='my_form:a', task_sizes=(2, 2), "
            "classes=4, input_size=16, images_per_class=40), "
            "BackboneConfig(trunk_epochs=1, backbone='my_backbone'), "
            "FeatureConfig(views=1, augment='none'), "
            "train=TrainConfig(strategy='my_strategy', epochs=1)), Path('library')); "
            "print(type(r.model.strategy).__name__, r.fields['strategy'])")
    done = python(tmp_path, "-c", code)
    assert done.stdout.splitlines()[-1:] == ["Mine my_strategy"], done.stderr


def test_help_lists_the_names_of_installed_packages_and_imports_none(tmp_path):
    install(tmp_path)
    code = ("import sys; from pipelines.cli.main import run\n"
            "try: run(['train', '--help'])\n"
            "finally: print('loaded', [m for m in ('torch', 'my_plugin') if m in sys.modules])")
    done = python(tmp_path, "-c", code)
    text = "".join(done.stdout.replace("│", "").split())
    assert "naive,my_strategy}" in text
    assert "resnet152,my_backbone,partialhn:NAME,timm:NAME,torchvision:NAME}" in text
    assert "loaded[]" in text


@pytest.mark.parametrize(("points", "words"), [
    ("[partialhn.strategies]\nnaive = my_plugin:Mine\n",
     ["strategy 'naive' is defined by partialhn and by the package my-plugin"]),
    ("[partialhn.strategies]\nmine = my_plugin:Gone\n",
     ["strategy 'mine' cannot be imported from 'my_plugin:Gone': my_plugin has no Gone"]),
    ("[partialhn.strategies]\nmine = no_such_module:Mine\n",
     ["strategy 'mine' cannot be imported from 'no_such_module:Mine'", "ModuleNotFoundError"]),
    ("[partialhn.strategies]\nmine = my_plugin:form\n",
     ["strategy 'mine' at 'my_plugin:form' is a function"]),
])
def test_a_broken_package_is_named(tmp_path, points, words):
    install(tmp_path, points)
    code = ("from partialhn.errors import InputError; from partialhn.strategies import STRATEGIES\n"
            "try: STRATEGIES['mine']\n"
            "except InputError as error: print(error)")
    done = python(tmp_path, "-c", code)
    for word in words:
        assert word in done.stdout, done.stderr


def test_a_class_without_the_interface_is_refused(registered):
    from partialhn.strategies import Strategy

    registered("no_strategy", dict)
    with pytest.raises(InputError, match="'no_strategy' is dict; allowed: a subclass"):
        STRATEGIES["no_strategy"]
    registered("half", type("Half", (Strategy,), {"weights": lambda self, task: None}))
    with pytest.raises(InputError, match="does not define new_task"):
        STRATEGIES["half"]


def test_a_registered_strategy_is_like_any_other(registered):
    class Mine(STRATEGIES["naive"]):
        label, needs_every_task = "My own", True

    registered("my-own", Mine)
    config = Config.from_dict({"train": {"strategy": "my-own", "compare": ["naive"]}})
    assert config.train.needs_every_task
    assert (label_of("my-own"), label_of("naive"), label_of("gone")) == (
        "My own", "Naive fine-tuning", "gone")
    assert "my-own" in STRATEGIES
    with pytest.raises(InputError, match="'my-own' is defined by this program"):
        register_strategy("my-own", STRATEGIES["ewc"])
    with pytest.raises(InputError, match="registered as 'my own'; allowed: letters"):
        register_strategy("my own", Mine)


def test_names_are_checked_wherever_they_are_given():
    with pytest.raises(InputError, match="strategy is 'x'; allowed: partial_hn"):
        TrainConfig(strategy="x")
    with pytest.raises(InputError, match="backbone is 'x'; allowed: slim_resnet18"):
        BackboneConfig(backbone="x")


def test_every_line_of_the_tables_can_be_used(tmp_path):
    for name in OWN:
        assert STRATEGIES[name]
        assert needs_every_task(name) == (name == "joint")
        assert set(OWN[name].options) <= set(TrainConfig.__dataclass_fields__)
    assert set(BASELINE_OPTIONS) == {"buffer", "ewc_strength", "lwf_strength"}
    for name in BACKBONES:
        assert len(build_network(name, 2).blocks()) == 4
    assert list(FORMS)[:2] == ["digits", "torchvision"]
    assert converted_folder("s3://bucket/digits", tmp_path) is None
    with pytest.raises(InputError, match="'digits:x'; allowed: digits"):
        converted_folder("digits:x", tmp_path)


def test_number_types_of_the_option_are_those_that_can_be_stored():
    assert typing.get_args(FeatureDtype) == tuple(DTYPES)
