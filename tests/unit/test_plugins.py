"""Tables of strategies, backbones, data forms and number types, and how others add to them."""

import http
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from partialhn.config import BackboneConfig, Config, FeatureConfig, TrainConfig
from partialhn.data.table import FORMS, converted_folder
from partialhn.errors import InputError
from partialhn.features.codec import NumberType, decode, encode, number_type
from partialhn.features.table import NUMBER_TYPES, register_number_type
from partialhn.networks.backbone import build_network
from partialhn.networks.table import BACKBONES
from partialhn.run import check, with_strategy
from partialhn.strategies import STRATEGIES
from partialhn.strategies.table import (
    OWN,
    TABLE,
    declared_options,
    label_of,
    needs_every_task,
    option_values,
    register_strategy,
)
from partialhn.training.lineage import BASELINE_OPTIONS, settings_of

ROOT = Path(__file__).parents[2]
CODE = '''
import pyarrow as pa
import sys
import torch
from partialhn.features.codec import NumberType
from partialhn.data.library import convert_digits
from partialhn.networks.slim_resnet18 import SLIM_RESNET18 as SMALL
from partialhn.strategies.shared_head import SharedHead
class Mine(SharedHead):
    label = "My strategy"
    options = {"share": 0.5, "times": 2, "loud": False}
    def __init__(self, *arguments):
        super().__init__(*arguments)
        print("options", self.settings)
DOUBLE = NumberType(torch.float64, pa.float64())
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
[partialhn.number_types]
my_double = my_plugin:DOUBLE
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


def test_an_installed_package_adds_a_line_to_every_table(tmp_path):
    install(tmp_path)
    done = python(tmp_path, "-c", "from pipelines.cli.main import main; main()", "train",
                  "--data", "my_form:given",
                  "--strategy", "my_strategy", "--backbone", "my_backbone", *SMALL,
                  "--feature-dtype", "my_double", "--strategy-options", "share=0.25", "loud=true")
    assert done.returncode == 0, done.stderr
    assert "form given" in done.stdout
    assert "options {'share': 0.25, 'times': 2, 'loud': True}" in done.stdout
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["strategy"], result["config"]["features"]["feature_dtype"]) == (
        "my_strategy", "my_double")
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


@pytest.fixture
def number_types():
    before = set(NUMBER_TYPES)
    yield
    for name in set(NUMBER_TYPES) - before:
        NUMBER_TYPES.unregister(name)


@pytest.mark.usefixtures("number_types")
def test_a_number_type_is_one_line():
    register_number_type("float64", NumberType(torch.float64, pa.float64()))
    register_number_type("float8", NumberType(torch.float8_e4m3fn, pa.uint8()))
    register_number_type("int8-7", NumberType(torch.int8, pa.int8(), levels=7))
    z_NVCHW = torch.randn(5, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    errors = {}
    for name in NUMBER_TYPES:
        assert FeatureConfig(feature_dtype=name).feature_dtype == name
        shard = pa.py_buffer(encode(z_NVCHW, np.arange(5), list("abcde"), name, "none", "shard"))
        block = decode(shard, name, 5, (2, 3, 4, 4))
        assert block.z_NVCHW.dtype is number_type(name).tensor
        read_NVCHW = block.z_NVCHW.float()
        if block.scale_C is not None:
            read_NVCHW = read_NVCHW * block.scale_C.view(1, 1, -1, 1, 1)
        errors[name] = (read_NVCHW - z_NVCHW).abs().max().item()
    assert errors["float64"] == errors["float32"] == 0
    assert sorted(errors, key=errors.__getitem__)[2:] == ["float16", "bfloat16", "int8", "float8",
                                                          "int8-7"]
    assert encode_one(1e39, "float64")
    with pytest.raises(InputError, match="not finite as float32"):
        encode_one(1e39, "float32")


def encode_one(value, name):
    return encode(torch.full((1, 1, 1, 1, 1), value, dtype=torch.float64), np.zeros(1), ["a"],
                  name, "none", "shard")


@pytest.mark.usefixtures("number_types")
def test_a_number_type_that_cannot_be_one_is_named():
    with pytest.raises(InputError, match=r"torch\.float64 and float; allowed: two types"):
        NumberType(torch.float64, pa.float32())
    register_number_type("mine", dict)
    with pytest.raises(InputError, match="number type 'mine' is a type; allowed: a partialhn"):
        number_type("mine")
    with pytest.raises(InputError, match="number type 'mine' is a type"):
        check(Config(features=FeatureConfig(feature_dtype="mine")))
    with pytest.raises(InputError, match="feature_dtype is 'x'; allowed: float32, float16"):
        FeatureConfig(feature_dtype="x")


def test_a_data_form_that_gives_no_folder_is_named(tmp_path):
    for gives in (None, tmp_path / "none", 3):
        FORMS.register("mine", lambda *_, gives=gives: gives)
        try:
            with pytest.raises(InputError, match=r"data form 'mine' gives .* for 'mine:a'"):
                converted_folder("mine:a", tmp_path)
        finally:
            FORMS.unregister("mine")


@pytest.mark.parametrize(("given", "message"), [
    (["share=half"], "share=half; allowed: a number, such as the default 0.5"),
    (["share=nan"], "share=nan; allowed: a number"),
    (["times=1.5"], "times=1.5; allowed: a whole number, such as the default 2"),
    (["loud=1"], "loud=1; allowed: true or false"),
    (["share"], r"'share'; allowed: share=0.5 \(mine\), times=2 \(mine\)"),
    (["part=1"], r"'part=1'; allowed: share=0.5 \(mine\)"),
    (["times=1", "times=2"], "times twice; allowed: one value for each")])
def test_an_option_that_a_strategy_does_not_have_is_named(registered, given, message):
    options = {"share": 0.5, "times": 2, "loud": False}
    registered("mine", type("Mine", (STRATEGIES["naive"],), {"options": options}))
    with pytest.raises(InputError, match=message):
        TrainConfig(strategy="mine", strategy_options=given)
    with pytest.raises(InputError, match="allowed: none with the strategy naive, which declares"):
        TrainConfig(strategy="naive", strategy_options=given)


def test_each_strategy_of_a_run_gets_its_own_options_alone(registered):
    for name, option in (("mine", "share"), ("other", "times")):
        registered(name, type(name, (STRATEGIES["naive"],), {"options": {option: 2}}))
    given = {"strategy": "mine", "compare": ("other", "naive")}
    config = Config(train=TrainConfig(**given, strategy_options=("share=3", "times=4")))
    for name, own in (("mine", ("share=3",)), ("other", ("times=4",)), ("naive", ())):
        assert with_strategy(config, name).train.strategy_options == own
        assert with_strategy(config, name).train.compare == ()
    alone = Config(train=TrainConfig(strategy="mine", strategy_options=("share=3",)))
    assert config.train.alone() == alone.train
    assert settings_of(config)["train"] == settings_of(alone)["train"]
    product = TrainConfig(compare=("mine",), strategy_options=("share=3",))
    assert with_strategy(Config(train=product), "partial_hn").train == TrainConfig()


def test_a_default_that_no_option_can_have_is_named(registered):
    registered("odd", type("Odd", (STRATEGIES["naive"],), {"options": {"share": None}}))
    with pytest.raises(InputError, match="'odd' declares the option share with the default None"):
        TrainConfig(strategy="odd", strategy_options=["share=1"])


@pytest.mark.parametrize(("default", "given", "value"), [
    (np.float64(0.5), "0.25", 0.25), (np.float32(0.5), "0.25", 0.25), (np.int64(2), "3", 3),
    (np.bool_(False), "true", True), (http.HTTPStatus.OK, "3", 3)])
def test_a_default_of_numpy_is_a_plain_number(registered, default, given, value):
    registered("mine", type("Mine", (STRATEGIES["naive"],), {"options": {"share": default}}))
    assert TrainConfig(strategy="mine", strategy_options=[f"share={given}"])
    declared = declared_options("mine")
    assert option_values(declared, [f"share={given}"]) == {"share": value}
    assert type(option_values({"share": default}, [])["share"]) is type(value)
    with pytest.raises(InputError, match=r"strategy_options has share=x; allowed: (a|true)"):
        TrainConfig(strategy="mine", strategy_options=["share=x"])


def test_options_of_a_strategy_belong_to_the_names_of_what_it_learns(registered):
    registered("mine", type("Mine", (STRATEGIES["naive"],), {"options": {"share": 0.5}}))
    one, other = (Config(train=TrainConfig(strategy="mine", strategy_options=given))
                  for given in ((), ("share=0.3",)))
    assert settings_of(one) != settings_of(other)
    assert "strategy_options" not in settings_of(one)["train"]
    compared = Config(train=TrainConfig(compare=("mine",), strategy_options=("share=0.3",)))
    assert settings_of(compared) == settings_of(Config()), "the product learns the same"
