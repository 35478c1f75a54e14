"""Networks of every family, cut at every block: trunk and head together are the network.

Legend: B batch, C channels, H W spatial, K classes.
"""

import copy
import itertools

import pytest
import torch
from torch import nn

from partialhn.errors import InputError
from partialhn.networks.backbone import build_network, find_backbone, pooled
from partialhn.networks.cut import CutNetwork, depth_number
from partialhn.networks.depths import depths_of, known_backbones
from partialhn.networks.division import with_one_classifier
from partialhn.networks.head import EarlierWeights, Head, HeadWeights, head_start, matrices
from partialhn.networks.later_blocks import LaterBlocks
from partialhn.networks.trunk import feature_shape, multiply_adds
from pipelines.cli.main import run

timm = pytest.importorskip("timm", reason="timm is an extra of this package")

FAMILIES = {  # name: (input size, blocks)
    "partialhn:slim_resnet18": (32, 9),
    "timm:resnet18": (64, 9),
    "timm:vit_tiny_patch16_224": (64, 13),
    "timm:vit_small_patch14_dinov2": (56, 13),
    "timm:vit_small_patch16_dinov3": (64, 13),
    "timm:tf_efficientnet_lite0": (64, 18),
    "timm:mobilenetv3_small_050": (64, 14),
    "timm:convnext_atto": (64, 13),
    "timm:swin_tiny_patch4_window7_224": (64, 13),
    "timm:cait_xxs24_224": (32, 27),
    "timm:xcit_nano_12_p16_224": (64, 15),
    "timm:deit_tiny_distilled_patch16_224": (32, 13),  # it has two classifiers
    "timm:test_byobnet": (64, 5),  # from here to torchvision: classes that nobody described
    "timm:test_mambaout": (64, 10),
    "timm:test_vit_relpos": (64, 10),
    "timm:regnetx_002": (64, 14),
    "timm:resnetv2_18": (64, 9),  # its classifier is a convolution
    "torchvision:resnet18": (64, 9),
    "torchvision:efficientnet_b0": (64, 18),
    "torchvision:mobilenet_v2": (64, 19),
    "torchvision:mobilenet_v3_small": (64, 13),
    "torchvision:convnext_tiny": (64, 19),
    "torchvision:swin_t": (64, 13),
    "torchvision:vit_b_32": (64, 13),
}


def random_network(name):
    """A network whose classifier, vectors and statistics are drawn: fresh ones have zeros that
    would hide what is left out.
    """
    size, _ = FAMILIES[name]
    return drawn(build_network(name, 5, seed=1, input_size=size).eval())


@torch.no_grad()
def drawn(module):
    """The module, whose vectors and statistics are drawn in place."""
    generator = torch.Generator().manual_seed(2)
    for key, value in module.state_dict().items():
        if not value.is_floating_point() or key in ("mean_C", "std_C"):
            continue
        if key.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=generator)
        elif value.dim() == 1 or not value.any():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return module


@pytest.fixture(scope="module", params=FAMILIES)
def network(request):
    return random_network(request.param)


def own_weights(network, cut, head):
    """The network's own weights as a task's, with folded statistics."""
    norms = [layer for layer in cut.stages.modules() if isinstance(layer, nn.BatchNorm2d)]
    start = head_start(cut, "batch", 0)
    statistics = [layer.running_mean for layer in norms] + [layer.running_var for layer in norms]
    vectors = head.fold(start.norm, torch.cat(statistics)) if norms else start.norm
    if not len(cut.stages):  # a linear head standardises; here by what changes nothing
        count = head.width
        vectors = head.fold(start.norm, torch.cat([torch.zeros(count), torch.ones(count) - 1e-5]))
    return HeadWeights(head.named(start.matrices), vectors, network.classifier.weight,
                       network.classifier.bias)


def pixels(network, count):
    size = network.input_size
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(count))


@torch.no_grad()
def test_the_blocks_are_the_body(network):
    images_BCHW = pixels(network, 2)
    wanted = network(images_BCHW)
    assert wanted.std() > 1e-3
    assert len(network.blocks()) == FAMILIES[network.name][1]
    if network.name != "partialhn:slim_resnet18" and not network.backbone.replaced:
        found, scale = network.body(network.normalise(images_BCHW)), wanted.abs().max()
        torch.testing.assert_close(found / scale, wanted / scale, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_beit_is_its_blocks(monkeypatch):
    """The smallest BEiT has 86 million weights: it is cut once."""
    name = "timm:beit_base_patch16_224"
    monkeypatch.setitem(FAMILIES, name, (64, 13))
    network = random_network(name)
    test_the_blocks_are_the_body(network)
    images_BCHW = pixels(network, 2)
    cut = CutNetwork.of(network, 12)
    head = Head(cut, "batch", 8).eval()
    torch.testing.assert_close(head(cut.trunk(images_BCHW), own_weights(network, cut, head)),
                               network(images_BCHW), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("name", "size"), [
    ("deit_tiny_distilled_patch16_224", 32), ("levit_conv_128s", 64)])
def test_one_classifier_is_the_mean_of_a_distilled_networks_two(name, size):
    network = build_network(f"timm:{name}", 5, input_size=size).eval()
    original = drawn(timm.create_model(name, num_classes=5, img_size=size).eval())
    classifiers = (network.backbone.classifier, *network.backbone.replaced)
    one = with_one_classifier(copy.deepcopy(original), classifiers)
    network.body.load_state_dict(one.state_dict())
    images_BCHW = pixels(network, 7)
    wanted = original(network.normalise(images_BCHW))
    assert wanted.std() > 1e-3
    torch.testing.assert_close(network(images_BCHW), wanted)


@torch.no_grad()
def test_trunk_and_head_are_the_network_at_every_block(network):
    batches = [pixels(network, 1), pixels(network, 7)]
    wanted = [network(images_BCHW) for images_BCHW in batches]
    whole = CutNetwork.of(network, len(network.blocks())).trunk
    outputs = [dict(whole.outputs(images_BCHW)) for images_BCHW in batches]
    for depth in outputs[0]:
        cut = CutNetwork.of(network, depth)
        head = Head(cut, "batch", 8).eval()
        weights = own_weights(network, cut, head)
        for features, logits_BK in zip(outputs, wanted, strict=True):
            found, scale = head(features[depth], weights), logits_BK.abs().max()
            torch.testing.assert_close(found / scale, logits_BK / scale, rtol=1e-5, atol=1e-5)
        if depth in (0, len(outputs[0]) // 2):  # pixels are maps also where blocks give tokens
            inner = range(len(cut.stages) - 1)
            found = LaterBlocks(head, weights)(outputs[0][depth], inner, inner)
            maps = [outputs[0][depth + 1 + block].flatten(2) for block in inner]
            for own_BC, wanted_BC in zip(found, [*(z_BCP.mean(2) for z_BCP in maps), *(
                    z_BCP.std(2, correction=0) for z_BCP in maps)], strict=True):
                scale = wanted_BC.abs().max().clamp_min(1e-3)
                torch.testing.assert_close(own_BC / scale, wanted_BC / scale, rtol=1e-4, atol=1e-4)
            # and a classifier that sees them, too
            means_BE = torch.cat([outputs[0][depth].mean((2, 3)),
                                  *(z_BCP.mean(2) for z_BCP in maps)], 1)
            weight_KE = torch.linspace(-1, 1, means_BE.shape[1]).expand(wanted[0].shape[1], -1)
            found = head(outputs[0][depth], weights._replace(
                earlier=EarlierWeights(weight_KE, tuple(inner))))
            expected = wanted[0] + means_BE @ weight_KE.T
            scale = expected.abs().max().clamp_min(1e-3)
            torch.testing.assert_close(found / scale, expected / scale, rtol=1e-4, atol=1e-4)
        shape = feature_shape(cut.trunk, batches[0])
        assert tuple(outputs[0][depth].shape[1:]) == shape == (cut.channels, *shape[1:])


def test_every_weight_is_generated_owned_or_kept_once(network):
    cut = CutNetwork.of(network, 1)
    head, start = Head(cut, "batch", 8), head_start(cut, "batch", 0)
    kept = [value for value in head.state_dict().values() if value.is_floating_point()]
    counted = (sum(value.numel() for value in start.matrices) + len(start.norm)
               + sum(value.numel() for value in kept))
    assert counted == sum(value.numel() for value in cut.stages.parameters())
    assert len(start.norm) == head.norm_length
    assert head.weight_count == sum(value.numel() for _, value in matrices(cut.stages))


@torch.no_grad()
def test_a_head_learns_with_a_gradient_for_every_matrix(network):
    depth = len(network.blocks()) - 2
    cut = CutNetwork.of(network, depth)
    head, start = Head(cut, "batch", 8).train(), head_start(cut, "batch", 0)
    weights = [value.clone().requires_grad_() for value in start.matrices]
    vectors = start.norm.clone().requires_grad_()
    with torch.enable_grad():
        logits_BK = head(cut.trunk(pixels(network, 7)), HeadWeights(
            head.named(weights), vectors, network.classifier.weight, network.classifier.bias,
            head.first_statistics()))
        logits_BK.square().sum().backward()
    assert all(value.grad.abs().max() > 0 for value in weights)
    assert (vectors.grad != 0).float().mean() > 0.5


@torch.no_grad()
def test_batch_norm_of_vectors_keeps_the_networks_statistics():
    """SHViT has one before its classifier; a task that trained it would change other tasks."""
    network = build_network("timm:shvit_s1", 5, input_size=128).eval()
    cut = CutNetwork.of(network, len(network.blocks()) - 1)
    head, start = Head(cut, "batch", 8).train(), head_start(cut, "batch", 0)
    before = {name: value.clone() for name, value in head.state_dict().items()}
    assert any(name.endswith("running_mean") for name in before)
    head(cut.trunk(pixels(network, 7)), HeadWeights(
        head.named(start.matrices), start.norm, network.classifier.weight,
        network.classifier.bias, head.first_statistics()))
    for name, value in head.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_tokens_are_stored_as_maps():
    network = random_network("timm:vit_small_patch16_dinov3")
    trunk = CutNetwork.of(network, 5).trunk
    images_BCHW = pixels(network, 2)
    assert feature_shape(trunk, images_BCHW) == (384, 16 + 5, 1)  # class token and 4 registers
    assert feature_shape(CutNetwork.of(network, 13).trunk, images_BCHW) == (384, 1, 1)


@torch.no_grad()
def test_pooling_is_the_networks_own():
    network = random_network("timm:vit_tiny_patch16_224")
    trunk = CutNetwork.of(network, 13).trunk
    images_BCHW = pixels(network, 2)
    wanted = network.body.norm(network.body.forward_features(network.normalise(images_BCHW)))
    class_token = network.body.forward_features(network.normalise(images_BCHW))[:, 0]
    torch.testing.assert_close(pooled(trunk(images_BCHW)), class_token)
    assert not torch.allclose(pooled(trunk(images_BCHW)), wanted.mean(1))


@pytest.mark.parametrize(("generate", "parts"), [
    ("attention", {"attn.qkv", "attn.proj"}), ("mlp", {"mlp.fc1", "mlp.fc2"}),
    ("*.qkv.*", {"attn.qkv"}), ("blocks.11.mlp.fc1.weight", {"mlp.fc1"})])
def test_some_matrices_are_generated_and_the_others_stay(generate, parts):
    network = random_network("timm:vit_tiny_patch16_224")
    cut = CutNetwork.of(network, 11)
    head = Head(cut, "batch", 8, generate=generate).eval()
    names = {".".join(tensor.name.removesuffix(".weight").split(".")[-2:])
             for tensor in head.matrices}
    assert names == parts
    start = head_start(cut, "batch", 0, generate)
    weights = HeadWeights(head.named(start.matrices), start.norm, network.classifier.weight,
                          network.classifier.bias)
    images_BCHW = pixels(network, 2)
    with torch.no_grad():
        found = head(cut.trunk(images_BCHW), weights)
        torch.testing.assert_close(found, network(images_BCHW), rtol=1e-5, atol=1e-5)
    whole = Head(cut, "batch", 8)
    assert head.weight_count < whole.weight_count
    assert sum(value.numel() for value in head.state_dict().values()) == (
        whole.weight_count - head.weight_count)


def test_a_pattern_that_names_nothing_is_refused():
    cut = CutNetwork.of(build_network("timm:resnet18", 2), 7)
    with pytest.raises(InputError, match=r"generate is 'attention', which names no matrix above"
                                         r".* such as layer4.0.conv1.weight"):
        Head(cut, "batch", 8, generate="attention")


def test_multiply_adds_count_attention():
    network = build_network("torchvision:vit_b_32", 5, input_size=64).eval()
    images_BCHW = pixels(network, 2)
    width, tokens = 768, 5
    block = tokens * width * width * (3 + 1 + 4 + 4) + 2 * tokens * tokens * width
    stem = 4 * width * 3 * 32 * 32
    assert multiply_adds(network, images_BCHW) == stem + 12 * block + width * 5


@pytest.mark.parametrize(("given", "number"), [
    (0, 0), (13, 13), ("4", 4), ("stem", 1), ("blocks.0", 2), ("blocks.11", 13), ("75%", 10),
    ("0%", 0), ("100%", 13), ("12.5%", 2), ("auto", 10)])
def test_a_depth_is_a_number_a_block_or_a_share(given, number):
    names = ["stem", *(f"blocks.{index}" for index in range(12))]
    assert depth_number(given, names, "a network") == number


@pytest.mark.parametrize("given", [14, -1, "blocks.12", "101%", "x%", "-5%", "", "2.5"])
def test_a_depth_that_is_not_there_is_refused(given):
    names = ["stem", *(f"blocks.{index}" for index in range(12))]
    with pytest.raises(InputError, match=r"freeze_depth is .*0 \(nothing frozen\) to 13 \(all "
                                         r"blocks of a network\), a share such as 75%, or a "
                                         r"block: stem, blocks.0"):
        depth_number(given, names, "a network")


@pytest.mark.parametrize(("name", "size", "message"), [
    ("timm:vit_tiny_patch16_225", 32, "does not have; near it: vit_tiny_patch16_224"),
    ("timm:volo_d1_224", 32, "a VOLO whose classifier is .*aux_head.*; allowed: .* one linear"),
    ("timm:hrnet_w18_small", 32, "cannot be cut: behind stage2.0.fuse_layers.1.0 it calculates "
                                 "with more than"),
    ("timm:halonet_h1", 120, "timm:halonet_h1 cannot be built for input_size 120: Assertion"),
    ("timm:vit_tiny_patch16_224", 40, "cannot be built for input_size 40"),
    ("torchvision:resnet19", 32, "such as resnet1"),
    ("torchvision:vgg11", 32, "of the families resnet"),
    ("torchvision:vit_b_16", 40, "cannot be built for input_size 40"),
    ("partialhn:resnet18", 32, "allowed: partialhn:slim_resnet18"),
    ("timm:", 32, "allowed: slim_resnet18, .*timm:NAME, torchvision:NAME"),
    ("hub:x", 32, "allowed: slim_resnet18, .*timm:NAME, torchvision:NAME")])
def test_networks_that_cannot_be_cut_are_refused(name, size, message):
    with pytest.raises(InputError, match=message):
        build_network(name, 2, input_size=size)


def test_depths_say_shape_share_and_weights():
    network = build_network("timm:vit_tiny_patch16_224", 2, input_size=64)
    lines = depths_of(network)
    assert [line.name for line in lines] == ["pixels", "stem",
                                             *(f"blocks.{index}" for index in range(12))]
    assert lines[0].shape_CHW == (3, 64, 64)
    assert lines[5].shape_CHW == (192, 17, 1)
    assert lines[-1].shape_CHW == (192, 1, 1)
    block = 12 * 192 * 192
    assert [line.generated for line in lines[1:]] == [block * (12 - i) for i in range(13)]
    shares = [line.frozen_share for line in lines]
    assert shares[0] == 0
    assert shares[-1] == 1
    assert all(late - early == pytest.approx((1 - shares[1]) / 12) for early, late
               in itertools.pairwise(shares[1:]))
    attention = depths_of(network, "attention")
    assert [line.generated for line in attention[1:]] == [block // 3 * (12 - i) for i in range(13)]


def test_the_command_lists_the_depths_of_a_network(capsys):
    assert run(["backbones", "timm:mobilenetv3_small_050", "--input-size", "64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 1 + 15 + 1
    assert lines[3].split()[:3] == ["1", "stem", "16x32x32"]
    assert lines[-2].split()[1:3] == ["conv_head", "1024x1x1"]
    assert run(["backbones", "torchvision:*"]) == 0
    names = capsys.readouterr().out.splitlines()
    assert "torchvision:vit_b_16" in names
    assert "torchvision:vgg11" not in names
    assert run(["backbones", "zzz*"]) == 2
    assert "matches no name" in capsys.readouterr().err


def test_every_listed_network_of_torchvision_can_be_built():
    for name in known_backbones("torchvision:*"):
        assert find_backbone(name).classifier
