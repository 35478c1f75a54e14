"""Exported files give the model's answers, and run without this package."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from partialhn.checkpoints.model import Model, TaskInfo
from partialhn.config import Config
from partialhn.errors import InputError, IntegrityError
from partialhn.export import export as exporting
from partialhn.export.export import export
from partialhn.export.network import TaskNetwork, TaskNetworks
from partialhn.features.closed_form import LinearClassifier
from partialhn.networks.backbone import build_network
from partialhn.networks.cut import CutNetwork
from partialhn.networks.head import Head, head_start
from partialhn.networks.supplied import supplied_network
from partialhn.pixels import Pixels
from partialhn.predict import Predictor
from partialhn.strategies import STRATEGIES

ROOT = Path(__file__).parents[2]
INFOS = (TaskInfo("cats", ("lion", "puma")), TaskInfo("dogs", ("pug", "collie", "poodle")),
         TaskInfo("birds", ("owl", "kite")))
STREAM = {"data": {"data": "digits", "input_size": 32}, "hypernet": {"fresh_columns": 4}}


def predictor_of(backbone="slim_resnet18", depth=3, strategy="partial_hn", norm="batch", size=32,
                 side=None, earlier=None):
    """A model whose trunk and tasks have drawn weights, and with `side` a linear last task; with
    `earlier` the classifiers of the last two see the features of these blocks, too.
    """
    config = Config.from_dict(STREAM | {
        "data": {"data": "digits", "input_size": size},
        "backbone": {"backbone": backbone, "freeze_depth": depth},
        "features": {"feature_dtype": "int8"},
        "hypernet": {"norm": norm, "norm_groups": 4, "fresh_columns": 4},
        "train": {"strategy": strategy, "precision": "bfloat16"}})
    network = drawn(build_network(backbone, 2, seed=1, input_size=size).eval(), 0.02)
    network.set_pixels(Pixels(crop=0.9, interpolation="bicubic", mean=(0.4, 0.5, 0.3)))
    cut = CutNetwork.of(network, depth)
    start = head_start(cut, norm, 0)
    learner = STRATEGIES[strategy](Head(cut, norm, 4), start, config)
    for task, info in enumerate(INFOS):
        learner.add_task(len(info.classes))
        learner.begin(task)
        drawn(learner, 0.05, task)
        learner.finish(task)
    if side:
        features = cut.trunk(torch.zeros(1, 3, size, size, dtype=torch.uint8))[0]
        count = len(features) * min(side, features.shape[-1]) ** 2
        learner.take_linear(2, LinearClassifier(
            torch.randn(2, count), torch.randn(2), torch.zeros(0, 2)))
    for task in (1, 2) if earlier is not None else ():
        z_BCHW = torch.zeros(1, cut.channels, 8, 8)
        widths = [z_BCHW.shape[1] for block in cut.stages
                  if len(z_BCHW := block(z_BCHW))]
        count = cut.channels + sum(widths[block] for block in earlier)
        own = learner.tasks[task]
        own.earlier_KE = torch.randn(len(own.bias_K), count).half()
        own.earlier_blocks = torch.tensor(earlier, dtype=torch.int64)
    return Predictor(Model(config, cut.trunk, learner.requires_grad_(False).eval(), INFOS))


@torch.no_grad()
def drawn(module, spread, seed=0):
    """Fresh weights have zeros and equal tasks, which would hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.state_dict().items():
        if value.is_floating_point() and name not in ("mean_C", "std_C"):
            noise = torch.randn(value.shape, generator=generator)
            value.add_(spread * (noise.abs() if name.endswith(("var", "variance")) else noise))
    return module


def images(size=32, count=5):
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def ours(predictor, task, images_BCHW):
    z_BCHW = predictor.features(images_BCHW)
    return np.array([answer.probabilities
                     for answer in predictor.answers(z_BCHW, [task] * len(images_BCHW))])


def softmax(logits_BK):
    return torch.as_tensor(logits_BK).softmax(1).numpy()


@pytest.fixture(scope="module")
def mixed():
    """Two generated heads, and a linear one of 2 x 2 cells."""
    return predictor_of(side=2)


@pytest.mark.parametrize("options", [
    {"strategy": "separate_heads", "depth": 0}, {"strategy": "separate_heads", "norm": "group"},
    {"strategy": "ridge", "depth": 2}, {"strategy": "ncm", "depth": 4}, {"depth": 4, "side": 1},
    {"strategy": "linear_probe"}, {"strategy": "naive"}, {"side": 3}, {"norm": "instance"},
    {"depth": 1, "earlier": [0, 1]}, {"earlier": []}],
    ids=str)
def test_a_plain_network_calculates_what_the_model_does(options):
    predictor, pixels_BCHW = predictor_of(**options), images().float() / 255
    head = predictor.model.strategy.head
    weights = [predictor.head_weights(task) for task in range(3)]
    together = TaskNetworks(predictor.model.trunk, head, weights)
    for task, info in enumerate(INFOS):
        expected = ours(predictor, info.name, images())
        alone = TaskNetwork(predictor.model.trunk, head, weights[task])
        np.testing.assert_allclose(softmax(alone(pixels_BCHW)), expected, atol=1e-5)
        found = softmax(together(pixels_BCHW, torch.tensor(task)))
        np.testing.assert_allclose(found[:, :len(info.classes)], expected, atol=1e-5)
        assert not found[:, len(info.classes):].any()


def test_an_onnx_file_answers_as_the_model_where_this_package_is_not(mixed, tmp_path):
    """One image, then several of other sizes, greyscale of 8 and 16 bits too, by the record."""
    pytest.importorskip("onnxruntime")
    done = export(mixed, "dogs", tmp_path / "dogs.onnx", origin="models:/s/3")
    assert (done.record["task"], done.record["classes"]) == ("dogs", ["pug", "collie", "poodle"])
    assert done.record["model"] == "models:/s/3"
    names = [tmp_path / f"{index}.png" for index in range(4)]
    for index, name in enumerate(names):
        picture = images(size=50)[index, :, :41 + index].permute(1, 2, 0).numpy()
        Image.fromarray({0: picture[..., 0], 3: picture[..., 0] * np.uint16(257)}
                        .get(index, picture)).save(name)
    expected = mixed.predict([name.read_bytes() for name in names], "dogs")
    for given in (names[:1], names):
        ran = subprocess.run([sys.executable, ROOT / "examples" / "run_exported.py",
                              tmp_path / "dogs.onnx", *given], capture_output=True, text=True,
                             cwd=tmp_path, env=os.environ | {"PYTHONPATH": ""}, check=False)
        assert ran.returncode == 0, ran.stderr
        printed = re.findall(r"(\S+): (\S+)  \(probability ([\d.]+)\)", ran.stdout)
        assert [label for _, label, _ in printed] == expected.labels[:len(given)]
        np.testing.assert_allclose([float(share) for _, _, share in printed],
                                   expected.probabilities_BK.max(1)[:len(given)], atol=2e-4)


def test_an_onnx_file_of_all_tasks_takes_the_task_as_an_input(mixed, tmp_path):
    ort = pytest.importorskip("onnxruntime")
    done = export(mixed, "all", tmp_path / "all.onnx")
    session, pixels_BCHW = ort.InferenceSession(tmp_path / "all.onnx"), images().float() / 255
    for index, task in enumerate(done.record["tasks"]):
        (logits_BL,) = session.run(None, {"pixels": pixels_BCHW.numpy(), "task": np.array(index)})
        found, expected = softmax(logits_BL), ours(mixed, task["name"], images())
        np.testing.assert_allclose(found[:, :len(task["classes"])], expected, atol=1e-4)
        assert not found[:, len(task["classes"]):].any()


ALONE = """
import io, json, sys
class NotHere:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("partialhn", "pipelines", "timm", "torchvision"):
            raise ImportError(name)
sys.meta_path.insert(0, NotHere())
import torch
files = {"partialhn.json": ""}
network = torch.export.load(sys.argv[1], extra_files=files).module()
pixels = torch.load(io.BytesIO(sys.stdin.buffer.read()))
answers = [network(pixels[:count], torch.tensor(1)).softmax(1).tolist() for count in (1, 5)]
print(json.dumps([answers, json.loads(files["partialhn.json"])]))
"""


def test_a_program_of_pytorch_runs_where_this_package_cannot_be_imported(mixed, tmp_path):
    done = export(mixed, "all", tmp_path / "all.pt2", "torch")
    buffer = io.BytesIO()
    torch.save(images().float() / 255, buffer)
    ran = subprocess.run([sys.executable, "-c", ALONE, tmp_path / "all.pt2"],
                         input=buffer.getvalue(), capture_output=True, check=False)
    assert ran.returncode == 0, ran.stderr.decode()
    (one, five), record = json.loads(ran.stdout)
    assert record == done.record
    expected = ours(mixed, "dogs", images())
    np.testing.assert_allclose(five, expected, atol=1e-4)
    np.testing.assert_allclose(one, expected[:1], atol=1e-4)


@pytest.mark.parametrize(("options", "call"), [
    ({"backbone": "resnet18", "depth": 2}, "torchvision.models.get_model('resnet18', "
                                           "num_classes=3)"),
    ({"backbone": "timm:mobilenetv3_small_050", "depth": 14},
     "timm.create_model('mobilenetv3_small_050', num_classes=3)"),
    ({"backbone": "timm:test_vit", "depth": 3}, "timm.create_model('test_vit', num_classes=3, "
                                                "img_size=32)"),
    ({"backbone": "timm:test_resnet", "depth": 2}, "timm.create_model('test_resnet', "
                                                   "num_classes=3)")], ids=str)
def test_tensors_load_into_the_librarys_own_network(options, call, tmp_path):
    timm = pytest.importorskip("timm", reason="timm is an extra of this package")
    import torchvision
    from safetensors.torch import load_file

    predictor = predictor_of(**options)
    record = export(predictor, "dogs", tmp_path / "dogs.safetensors", "safetensors").record
    assert record["loads_into"] == call
    network = eval(call, {"timm": timm, "torchvision": torchvision}).eval()
    network.load_state_dict(load_file(tmp_path / "dogs.safetensors"))
    mean_C, std_C = (torch.tensor(record["preprocessing"][key])[:, None, None]
                     for key in ("mean", "std"))
    with torch.no_grad():
        found = softmax(network((images().float() / 255 - mean_C) / std_C))
    np.testing.assert_allclose(found, ours(predictor, "dogs", images()), atol=1e-4)


def test_an_exported_network_as_a_trunk_sees_the_pixels_that_it_was_trained_with(tmp_path):
    path = tmp_path / "dogs.safetensors"
    export(predictor_of(backbone="torchvision:resnet18"), "dogs", path, "safetensors")
    network = supplied_network(str(path), "torchvision:resnet18", 2)
    assert (network.pixels.crop, network.pixels.interpolation) == (0.9, "bicubic")
    assert network.pixels.mean == pytest.approx((0.4, 0.5, 0.3))
    assert not any("does not say which pixels" in note for note in network.notes)


@pytest.mark.parametrize(("options", "why"), [
    ({}, "slim_resnet18 is no network of another library"),
    ({"backbone": "resnet18", "norm": "group"}, "norm group in place of batch norm"),
    ({"backbone": "resnet18", "strategy": "ridge"},
     "a linear classifier of the features after block layer3")], ids=str)
def test_tensors_that_fit_no_librarys_network_say_so(options, why, tmp_path):
    record = export(predictor_of(**options), "cats", tmp_path / "cats.safetensors",
                    "safetensors").record
    assert record["loads_into"] is None
    assert why in record["why_not"]


@pytest.mark.parametrize(("task", "name", "format", "message"), [
    ("fish", "a.onnx", "onnx", "task is 'fish'; allowed: cats, dogs, birds"),
    ("auto", "a.onnx", "onnx", "a file holds no task inference; allowed: cats, dogs, birds, or "
                               "all"),
    ("cats", "a.onnx", "torch", "output is 'a.onnx', but format is torch; allowed: a name that "
                                "ends in .pt2"),
    ("all", "a.safetensors", "safetensors", "allowed: a single task, or format onnx or torch"),
    ("cats", "old.onnx", "onnx", "output 'old.onnx' exists; allowed: another name")])
def test_what_cannot_be_exported_is_refused(mixed, task, name, format, message, tmp_path):
    (tmp_path / "old.onnx").write_text("old")
    with pytest.raises(InputError, match=message):
        export(mixed, task, tmp_path / name, format)
    assert [path.name for path in tmp_path.iterdir()] == ["old.onnx"]
    assert (tmp_path / "old.onnx").read_text() == "old"


def test_a_missing_package_names_the_extra(mixed, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(InputError, match=r"needs onnxscript.*pip install 'partialhn\[export\]'"):
        export(mixed, "cats", tmp_path / "cats.onnx")


def test_a_network_that_cannot_be_traced_is_named(mixed, tmp_path, monkeypatch):
    def by_values(stage, inputs):
        return inputs if inputs[0].sum() > 0 else (inputs[0] + 1,)

    hook = mixed.model.trunk.stages[0].register_forward_pre_hook(by_values)
    with pytest.raises(InputError, match="backbone slim_resnet18 cannot be written as a graph"):
        export(mixed, "cats", tmp_path / "cats.pt2", "torch")
    hook.remove()


def test_a_file_whose_answers_differ_is_not_written(mixed, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "TOLERANCE", -1.0)
    with pytest.raises(IntegrityError, match="probabilities differ"):
        export(mixed, "cats", tmp_path / "cats.safetensors", "safetensors")
    assert not list(tmp_path.iterdir())


def test_an_existing_file_is_replaced_on_purpose(mixed, tmp_path):
    file = tmp_path / "cats.safetensors"
    file.write_text("old")
    export(mixed, "cats", file, "safetensors", overwrite=True)
    assert file.stat().st_size > 1000
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "depth"), [
    ("timm:vit_tiny_patch16_224", 9), ("timm:vit_small_patch16_dinov3", 9),
    ("timm:convnext_atto", 8), ("timm:swin_tiny_patch4_window7_224", 9),
    ("timm:test_byobnet", 2), ("timm:test_mambaout", 5), ("timm:test_vit_relpos", 5),
    ("timm:tf_efficientnet_lite0", 12), ("timm:mobilenetv3_small_050", 10),
    ("torchvision:vit_b_32", 11), ("torchvision:swin_t", 12), ("torchvision:convnext_tiny", 16),
    ("torchvision:efficientnet_b0", 15), ("torchvision:mobilenet_v2", 15)])
def test_every_family_is_exported_in_every_format(backbone, depth, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("timm", reason="timm is an extra of this package")
    predictor = predictor_of(backbone, depth, size=64)
    export(predictor, "all", tmp_path / "all.onnx")
    export(predictor, "dogs", tmp_path / "dogs.pt2", "torch")
    assert export(predictor, "dogs", tmp_path / "dogs.safetensors",
                  "safetensors").record["loads_into"]
