"""Trunks that somebody else trained: files in all forms, matched by name, and clear refusals."""

import argparse
import dataclasses
import json
import warnings

import pytest
import torch
from safetensors.torch import save_file

from partialhn.config import BackboneConfig, Config, DataConfig
from partialhn.errors import InputError
from partialhn.networks.backbone import build_network
from partialhn.networks.cut import CutNetwork
from partialhn.networks.supplied import supplied_network
from partialhn.networks.tensors import hash_tensors
from partialhn.networks.torchvision_weights import torchvision_pixels
from partialhn.pixels import Pixels
from pipelines.cli.main import _parse
from pipelines.retrain.run import _config
from pipelines.settings import RetrainConfig


def fingerprint(network, depth=4):
    return CutNetwork.of(network, depth).trunk.fingerprint()


@pytest.fixture
def own(network):
    """The tensors of a network of ours, by the names of our own files."""
    return {key: value.clone() for key, value in network.state_dict().items()}


@pytest.fixture
def foreign(network):
    """The same tensors by the names that everybody else uses, without the classifier."""
    return {key: value.clone() for key, value in network.body.state_dict().items()
            if not key.startswith("fc.")}


@pytest.fixture
def load(tmp_path):
    """Writes an object as a file and loads a slim ResNet-18 from it."""
    def write(content, name="trunk.safetensors", part="", backbone="slim_resnet18"):
        path = tmp_path / name
        if name.endswith(".safetensors"):
            save_file(content, path)
        else:
            torch.save(content, path)
        return supplied_network(f"{path}{part}", backbone, 2)
    return write


def prefixed(prefix, tensors):
    return {prefix + key: value for key, value in tensors.items()}


def body_hash(network):
    return hash_tensors({key: value for key, value in network.body.state_dict().items()
                         if not key.startswith("fc.")})


# files of ours -----------------------------------------------------------------------------------


def test_supplied_weights_round_trip(network, own, tmp_path, images):
    save_file(own, tmp_path / "trunk.safetensors")
    found = supplied_network(str(tmp_path / "trunk.safetensors"), "slim_resnet18", 7)
    assert found.body.fc.out_features == 7
    assert (found.notes, found.pixels.geometry) == ((), "")
    for depth in range(5):
        assert fingerprint(found, depth) == fingerprint(network, depth)
    one, two = (CutNetwork.of(each, 3).trunk(images) for each in (found, network))
    assert torch.equal(one, two)


def test_supplied_weights_need_no_classifier(network, own, load):
    assert fingerprint(load({key: value for key, value in own.items()
                             if not key.startswith("body.fc.")})) == fingerprint(network)


def test_a_folder_or_a_checkpoint_holds_the_same_weights(network, own, load, tmp_path):
    for name in ("trunk.pt", "trunk.safetensors", "no-ending"):
        assert fingerprint(load(own, name)) == fingerprint(network)
    torch.save(own, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "folder").mkdir()
    save_file(own, tmp_path / "folder" / "model.safetensors")
    for source in (tmp_path / "old.pt", tmp_path / "folder"):
        assert fingerprint(supplied_network(str(source), "slim_resnet18", 2)) == fingerprint(
            network)


# names of others ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "backbone.", "encoder.", "network.",
                                    "_orig_mod.module.", "model.backbone.encoder.", "net.0."])
def test_words_before_the_names_do_not_matter(network, foreign, load, prefix):
    found = load(prefixed(prefix, foreign))
    assert body_hash(found) == body_hash(network)
    assert "does not say which pixels" in found.notes[-1]


@pytest.mark.parametrize("wrap", [
    lambda tensors: {"state_dict": tensors, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
    lambda tensors: {"model": prefixed("module.", tensors), "optimizer": {"state": {}}},
    lambda tensors: {"a": {"b": {"model_state_dict": tensors}}, "best": 0.5, "names": ["x"]},
])
def test_tables_around_the_weights_do_not_matter(network, foreign, load, wrap):
    assert body_hash(load(wrap(foreign), "checkpoint.pth")) == body_hash(network)


def test_missing_counters_are_no_matter_and_the_classifier_may_be_another(network, foreign, load):
    tensors = {key: value for key, value in foreign.items() if "num_batches" not in key}
    found = load(tensors | {"fc.weight": torch.zeros(1000, 160), "fc.bias": torch.zeros(1000)})
    assert fingerprint(found) != fingerprint(build_network("slim_resnet18", 2))
    assert found.body.fc.out_features == 2
    assert torch.equal(found.body.layer3[0].conv1.weight, network.body.layer3[0].conv1.weight)


def half(tensors):
    return {key: value.half() if value.is_floating_point() else value
            for key, value in tensors.items()}


def test_half_precision_is_converted_and_said(foreign, load):
    found = load(half(foreign))
    assert found.body.conv1.weight.dtype == torch.float32
    assert torch.equal(found.body.conv1.weight, foreign["conv1.weight"].half().float())
    assert any("holds float16 numbers; they are converted to float32" in note
               for note in found.notes)


def changed(tensors, by):
    return {key: value + by if value.is_floating_point() else value.clone()
            for key, value in tensors.items()}


@pytest.mark.parametrize(("average", "plain"), [
    ("model_ema", "model"), ("state_dict_ema", "state_dict"), ("teacher", "student"),
    ("ema_model.module", "model")])
def test_the_moving_average_is_preferred_said_and_can_be_chosen_against(foreign, load, average,
                                                                        plain):
    both = prefixed(f"{average}.", changed(foreign, 1)) | prefixed(f"{plain}.", foreign)
    found = load(both)
    assert torch.equal(found.body.conv1.weight, foreign["conv1.weight"] + 1)
    assert f"the moving average '{average}' of trunk" in found.notes[0]
    assert f"beside '{plain}'" in found.notes[0]
    chosen = load(both, part=f"#{plain}")
    assert torch.equal(chosen.body.conv1.weight, foreign["conv1.weight"])


def test_surplus_tensors_are_listed(foreign, load):
    found = load(prefixed("model.", foreign | {"projector.weight": torch.zeros(1)})
                 | {"optimizer.exp_avg": torch.zeros(2)})
    assert ("holds more than the network, which is not used: "
            "['projector.weight', 'optimizer.exp_avg']") in found.notes[0]


# refusals ----------------------------------------------------------------------------------------


def without(key):
    return lambda tensors: tensors.pop(key)


@pytest.mark.parametrize(("change", "message"), [
    (without("layer2.0.conv1.weight"), "missing .*layer2.0.conv1"),
    (lambda t: t.update({"conv1.weight": torch.zeros(64, 3, 3, 3)}),
     r"conv1.weight is \(64, 3, 3, 3\) in the file and \(20, 3, 3, 3\) in the network"),
    (lambda t: t.update({"layer1.2.conv1.weight": torch.zeros(20, 20, 3, 3)}),
     r"extra \['layer1.2.conv1.weight'\]"),
    (lambda t: t.update({"conv1.weight": torch.zeros(20, 3, 3, 3, dtype=torch.int8)}),
     r"whole numbers in \['conv1.weight'\]"),
    (lambda t: t["layer1.0.conv1.weight"].fill_(float("nan")),
     "tensor 'layer1.0.conv1.weight' .* holds NaN or infinity"),
    (lambda t: t["bn1.bias"][:1].fill_(float("inf")), "tensor 'bn1.bias' .* holds NaN or inf"),
    (lambda t: t["bn1.running_var"][:1].fill_(-0.5),
     "'bn1.running_var' .* is -0.5 at its least; allowed: a variance of 0 or more"),
])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_weights_that_do_not_fit(foreign, load, change, message, prefix):
    change(foreign)
    if prefix:
        for name in ("'bn1", "'layer1.0", "['conv1"):
            message = message.replace(name, name.replace("'", f"'{prefix}"))
    with pytest.raises(InputError, match=message):
        load(prefixed(prefix, foreign))


def test_weights_of_another_backbone(own, load):
    with pytest.raises(InputError, match=r"is not a resnet18: of another shape: body.bn1.bias is"):
        load(own, backbone="resnet18")


def test_a_file_of_ours_without_its_normalisation(own, load):
    del own["mean_C"]
    with pytest.raises(InputError, match=r"is missing \['mean_C'\]"):
        load(own)
    with pytest.raises(InputError, match=r"pixels.std is \(0.0, 0.0, 0.0\); allowed: three"):
        load(own | {"mean_C": torch.zeros(3), "std_C": torch.zeros(3)})


def test_two_equal_sets_of_weights_are_ambiguous(foreign, load):
    both = prefixed("left.", foreign) | prefixed("right.", changed(foreign, 1))
    with pytest.raises(InputError, match=r"holds 2 sets .*: 'left', 'right'; choose one, for "):
        load(both)
    assert load(both, part="#right").body.conv1.weight.mean() > 0.5
    with pytest.raises(InputError, match=r"no part 'middle' .*; allowed: 'left', 'right'"):
        load(both, part="#middle")


@pytest.mark.parametrize(("content", "message"), [
    (b"", r"is no file of weights: it begins with b''"),
    (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
    (b"<!DOCTYPE html><html>", "a web page"),
    (b"\x10\x00\x00\x00\x00\x00\x00\x00{]            ", "cannot be read as safetensors"),
    (b"PK\x03\x04 cut off", "cannot be read as a PyTorch checkpoint"),
    (b"\x80\x02cut off", "cannot be read as a PyTorch checkpoint"),
])
def test_files_that_are_no_weights(tmp_path, content, message):
    (tmp_path / "trunk").write_bytes(content)
    with pytest.raises(InputError, match=message):
        supplied_network(str(tmp_path / "trunk"), "slim_resnet18", 2)


def test_programs_of_pytorch_are_no_checkpoints(tmp_path):
    layer, path = torch.nn.Linear(2, 2).eval(), tmp_path / "trunk"
    with warnings.catch_warnings(action="ignore"):  # of torch.jit about its own future
        torch.jit.trace(layer, torch.zeros(1, 2)).save(path)
    program = torch.export.export(layer, (torch.zeros(1, 2),))
    for save in (lambda: None, lambda: torch.export.save(program, path)):
        save()
        with pytest.raises(InputError, match=r"is a program of torch.export or torch.jit; allowed"):
            supplied_network(str(path), "slim_resnet18", 2)


def test_files_without_tensors(load):
    for content in ({}, {"epoch": 3, "names": ["a"]}):
        with pytest.raises(InputError, match="holds no tensors"):
            load(content, "empty.pt")


@pytest.mark.parametrize("name", ["trunk.safetensors", "trunk.pth"])
def test_code_in_a_file_does_not_run(tmp_path, foreign, name):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save(foreign | {"a": Trap()}, tmp_path / name)
    with pytest.raises(InputError, match=r"objects of Python \(io.open\) .* would run code"):
        supplied_network(str(tmp_path / name), "slim_resnet18", 2)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(("source", "message"), [
    ("none.pt", "is no file; allowed: train, timm:NAME, hf-hub:OWNER/NAME, torchvision:NAME"),
    (".", "is a folder without model.safetensors or pytorch_model.bin"),
    ("torchvision:resnet18", "allowed: torchvision:NAME:WEIGHTS with a name"),
    ("torchvision:nonsense:IMAGENET1K_V1", "allowed: torchvision:NAME:WEIGHTS with a name"),
    ("torchvision:resnet50:IMAGENET1K_V1", "backbone is 'resnet18'; allowed: the same network"),
    ("torchvision:resnet18:IMAGENET9", "'IMAGENET9' of resnet18 are unknown; allowed: IMAGENET1K"),
    ("timm:resnet18", "backbone is 'resnet18'; allowed: a backbone of timm"),
    ("hf-hub:timm/resnet18.a1_in1k", "backbone is 'resnet18'; allowed: a backbone of timm"),
    ("package:resnet18", "allowed: package:efficientnet-lite0"),
    ("package:efficientnet-lite0", "in both: --backbone timm:tf_efficientnet_lite0"),
])
def test_trunks_that_cannot_be(source, message):
    with pytest.raises(InputError, match=message):
        supplied_network(source, "resnet18", 2)


def test_torchvision_weights_without_a_network(monkeypatch):
    import urllib.request

    def refuse(*_args, **_options):
        raise OSError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setenv("TORCH_HOME", "/nonexistent")
    with pytest.raises(InputError, match=r"cannot be downloaded .* fetch https://.*resnet152.*pth "
                                         r"where there is one, copy the file here"):
        supplied_network("torchvision:resnet152:IMAGENET1K_V2", "resnet152", 2)


# pixels ------------------------------------------------------------------------------------------


def test_the_first_backbones_see_the_whole_square_whatever_weights_expect(foreign, load, tmp_path):
    """Otherwise features and models that are stored would mean something else."""
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "x", "pretrained_cfg": {
        "input_size": [3, 224, 224], "interpolation": "bicubic", "crop_pct": 0.9,
        "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}}))
    found = load(foreign)
    assert found.pixels == Pixels(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    assert found.mean_C.tolist() == [0.5, 0.5, 0.5]
    assert not found.notes


@pytest.mark.parametrize("setting", [{"crop_pct": 2.0}, {"mean": [1]}, {"std": [0, 0, 0]},
                                     {"interpolation": "random"}, {"input_size": "big"}])
def test_a_configuration_beside_the_file_that_cannot_be_used(foreign, load, tmp_path, setting):
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": setting}))
    with pytest.raises(InputError, match=r"configuration of .*config.json cannot be used"):
        load(foreign)


@pytest.mark.parametrize("content", ["{", "[]", '{"pretrained_cfg": 3}', "{}"])
def test_configurations_of_other_programs_are_passed_over(foreign, load, tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    assert "does not say which pixels" in load(foreign).notes[0]


def test_torchvisions_own_pixels():
    found = torchvision_pixels("swin_t")
    assert (found.size, found.interpolation) == (224, "bicubic")
    assert found.crop == pytest.approx(224 / 232)


@pytest.mark.parametrize(("backbone", "trunk", "size"), [
    ("timm:tf_efficientnet_lite0", "package:efficientnet-lite0", 224),
    ("timm:vit_small_patch14_dinov2", "some.safetensors", 518),
    ("timm:convnext_tiny", "timm:convnext_tiny.fb_in22k_ft_in1k_384", 384),
    ("timm:convnext_tiny", "timm:convnext_tiny.no_such_weights", 224),
    ("torchvision:efficientnet_b1", "some.pth", 240),
    ("torchvision:efficientnet_b1", "torchvision:efficientnet_b1:IMAGENET1K_V2", 240),
    ("torchvision:resnet18", "torchvision:resnet18:IMAGENET1K_V1", 224),
    ("partialhn:slim_resnet18", "some.pth", 32),
    ("timm:tf_efficientnet_lite0", "train", 32),
    ("resnet18", "some.pth", 32),
])
def test_without_a_size_images_are_as_the_weights_expect_them(backbone, trunk, size):
    config = Config(backbone=BackboneConfig(backbone=backbone, trunk=trunk))
    assert config.data.input_size == size
    asked = dataclasses.replace(config, data=DataConfig(input_size=64))
    assert asked.data.input_size == 64
    assert Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("begin", [["--config", "c.yaml"], ["--preset", "split-cifar10"]])
def test_what_a_file_or_preset_leaves_open_is_decided_by_the_options_beside_it(
        begin, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("data: {tasks: 2}\n", encoding="utf-8")
    words = ["train", *begin, "--data", "DATA"]
    elsewhere = ["--backbone", "timm:convnext_tiny", "--trunk", "some.safetensors"]
    here, there = (Config.of(_parse([*words, *options])) for options in ([], elsewhere))
    assert (here.data.input_size, here.hypernet.starts_from) == (32, "first")
    assert (there.data.input_size, there.hypernet.starts_from) == (224, "network")
    (tmp_path / "c.yaml").write_text("data: {input_size: 32}\nhypernet: {starts_from: first}\n",
                                     encoding="utf-8")
    said = Config.of(_parse(["train", "--config", "c.yaml", "--data", "DATA", *elsewhere]))
    assert (said.data.input_size, said.hypernet.starts_from) == (32, "first")


def test_a_stream_keeps_the_size_that_it_began_with(tmp_path):
    """Earlier releases took 32 pixels whatever the weights expected."""
    file = tmp_path / "c.yaml"
    text = "backbone: {backbone: 'timm:convnext_tiny', trunk: some.safetensors, freeze_depth: 3}\n"
    file.write_text(text, encoding="utf-8")
    settings = RetrainConfig(name="s", config=str(file))
    begun = dataclasses.replace(_config(settings, None), data=DataConfig(input_size=32))
    assert _config(settings, None).data.input_size == 224
    assert _config(settings, begun.to_dict()).data.input_size == 32
    file.write_text(f"data: {{input_size: 64}}\n{text}", encoding="utf-8")
    with pytest.raises(InputError, match=r"data\.input_size is 64, .* started with 32"):
        _config(settings, begun.to_dict())


def test_a_stream_keeps_the_start_that_it_began_with(tmp_path):
    """Earlier releases started from the network whatever the norm was."""
    file = tmp_path / "c.yaml"
    file.write_text("backbone: {backbone: 'timm:convnext_tiny', trunk: some.safetensors, "
                    "freeze_depth: 3}\nhypernet: {norm: group}\n", encoding="utf-8")
    settings = RetrainConfig(name="s", config=str(file))
    new = _config(settings, None)
    assert new.hypernet.starts_from == "first"
    begun = dataclasses.replace(new, hypernet=dataclasses.replace(new.hypernet,
                                                                  starts_from="network"))
    assert _config(settings, begun.to_dict()).hypernet.starts_from == "network"
