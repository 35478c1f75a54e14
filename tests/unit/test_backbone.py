"""Execution and trunk: split at every depth, features of one image alone, supplied weights."""

import copy

import pytest
import torch
from torch import nn

from partialhn.errors import InputError
from partialhn.networks.backbone import build_network, spread_of
from partialhn.networks.cut import CutNetwork
from partialhn.networks.tensors import hash_tensors
from partialhn.networks.trunk import micro_batch, multiply_adds, run_trunk


def trunk_of(network, depth):
    return CutNetwork.of(network, depth).trunk


@pytest.fixture(scope="module", params=["slim_resnet18", "resnet18", "resnet50"])
def any_network(request, images):
    network = build_network(request.param, 3, seed=1).train()
    with torch.no_grad():
        for _ in range(3):
            network(images[:32])
    return network.eval()


@torch.no_grad()
@pytest.mark.parametrize("depth", range(5))
def test_trunk_then_stages_is_the_whole_network(any_network, images, depth):
    cut = CutNetwork.of(any_network, depth)
    trunk, stages = cut.trunk, cut.stages
    z_BCHW = trunk(images[:4])
    found = any_network.body.fc(stages.eval()(z_BCHW).mean((2, 3)))
    torch.testing.assert_close(found, any_network(images[:4]), rtol=1e-5, atol=1e-5)
    assert len(trunk.stages) == depth
    assert len(stages) == 4 - depth


@pytest.mark.parametrize("depth", range(5))
def test_features_are_the_same_bits_in_any_company(network, images, depth):
    trunk = trunk_of(network, depth)
    assert [micro_batch(side) for side in (16, 32, 40, 64, 224)] == [64, 64, 32, 16, 4]
    whole = run_trunk(trunk, images)
    assert torch.equal(run_trunk(trunk, images[:1]), whole[:1])
    assert torch.equal(run_trunk(trunk, images[5:6]), whole[5:6])
    assert torch.equal(run_trunk(trunk, images[:65]), whole[:65])
    assert torch.equal(run_trunk(trunk, images.flip(0)), whole.flip(0))
    assert torch.equal(run_trunk(trunk.train(), images[:7]), whole[:7])
    assert run_trunk(trunk, images[:0]).shape == (0, *whole.shape[1:])


def test_training_moves_nothing_of_a_trunk(network, images):
    trunk = trunk_of(network, 2)
    before = trunk.fingerprint()
    trunk.train()
    assert not any(module.training for module in trunk.modules())
    assert not any(value.requires_grad for value in trunk.parameters())
    assert not trunk(images).requires_grad
    assert trunk.fingerprint() == before


def test_a_trunk_is_a_copy(network):
    whole = copy.deepcopy(network)
    cut = CutNetwork.of(whole, 2)
    trunk, stages = cut.trunk, cut.stages
    before = trunk.fingerprint(), stages[0][0].conv1.weight.clone()
    with torch.no_grad():
        for value in whole.parameters():
            value.add_(1)
    assert trunk.fingerprint() == before[0]
    assert torch.equal(stages[0][0].conv1.weight, before[1])


def test_full_depth_is_pooled_and_depth_zero_only_normalises(network, images):
    assert trunk_of(network, 4)(images[:2]).shape == (2, 160, 1, 1)
    assert torch.equal(trunk_of(network, 0)(images[:2]), network.normalise(images[:2]))


def test_fingerprint_names_weights_statistics_depth_and_architecture(network):
    def fingerprint(change, depth=2):
        other = copy.deepcopy(network)
        change(other)
        return trunk_of(other, depth).fingerprint()

    def add(name):
        def change(other):
            with torch.no_grad():
                other.get_parameter(name).view(-1)[-1].add_(1e-3)
        return change

    def rename(other):
        other.name = "resnet18"

    same = fingerprint(lambda other: None)
    assert same == trunk_of(network, 2).fingerprint()
    assert fingerprint(add("body.layer3.0.conv1.weight")) == same
    assert fingerprint(lambda other: other.body.bn1.num_batches_tracked.add_(1)) == same
    different = [
        fingerprint(add("body.layer2.0.conv1.weight")), fingerprint(rename),
        fingerprint(add("body.layer1.0.bn1.bias")), fingerprint(lambda other: None, depth=1),
        fingerprint(lambda other: other.body.bn1.running_var.mul_(1.01)),
        fingerprint(lambda other: other.mean_C.add_(0.01))]
    assert len({same, *different}) == 1 + len(different)


def test_hash_tells_names_shapes_and_types_apart():
    x = torch.arange(4.0)
    hashes = [hash_tensors({"a": x}), hash_tensors({"b": x}), hash_tensors({"a": x.view(2, 2)}),
              hash_tensors({"a": x.view(torch.int32)}), hash_tensors({"a": x}, "prefix")]
    assert len(set(hashes)) == len(hashes)
    assert hash_tensors({"a": x, "b": x}) == hash_tensors({"b": x.clone(), "a": x})


def test_slim_resnet18_has_the_papers_size():
    body = build_network("slim_resnet18", 100).body
    generated = sum(value.numel() for value in body.parameters() if value.dim() == 4)
    assert sum(value.numel() for value in body.parameters()) == 1_109_240
    assert round(generated / 1e6, 2) == 1.09


def test_first_weights_depend_on_the_seed_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = hash_tensors(build_network("slim_resnet18", 2, seed=4).state_dict())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(9)
    assert hash_tensors(build_network("slim_resnet18", 2, seed=4).state_dict()) == first
    assert hash_tensors(build_network("slim_resnet18", 2, seed=5).state_dict()) != first


def test_unknown_backbone_and_depth_are_bad_input(network):
    with pytest.raises(InputError, match="backbone is 'vgg16'; allowed: slim_resnet18, resnet18"):
        build_network("vgg16", 2)
    for depth in (-1, 5):
        with pytest.raises(InputError, match=rf"freeze_depth is {depth}; allowed: 0 .* to 4"):
            CutNetwork.of(network, depth)


def test_multiply_adds_by_hand():
    layers = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(),
                           nn.Conv2d(8, 4, 3, stride=2, padding=1, groups=2), nn.Flatten(),
                           nn.Linear(4 * 8 * 8, 5))
    by_hand = 16 * 16 * 8 * 27 + 8 * 8 * 4 * (4 * 9) + 256 * 5
    for batch in (1, 3):
        assert multiply_adds(layers, torch.zeros(batch, 3, 16, 16)) == by_hand
    assert layers.training
    assert not any(layer._forward_hooks for layer in layers)


def test_multiply_adds_of_the_paper(network):
    """54.6 M a forward pass at 32 x 32: a third of the 163.9 M of a training step."""
    images_BCHW = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    whole = multiply_adds(network, images_BCHW)
    assert abs(whole / 1e6 - 54.6) < 0.1
    for depth in range(5):
        cut = CutNetwork.of(network, depth)
        trunk, stages = cut.trunk, cut.stages
        below = multiply_adds(trunk, images_BCHW)
        assert below + multiply_adds(stages, trunk(images_BCHW)) + 160 * 2 == whole


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_spread_of_a_map_is_its_standard_deviation_over_the_positions(layout):
    """Exactly zero where a channel is the same everywhere, though the mean of equal numbers
    may differ from them by rounding: what sees spreads scales them to one length.
    """
    z_BCHW = torch.randn(3, 5, 7, 6, generator=torch.Generator().manual_seed(0))
    z_BCHW[:, 1] += 1000
    z_BCHW[1, 2], z_BCHW[2] = 0.1, 0.7
    found_BC = spread_of(z_BCHW.to(memory_format=layout))
    wanted_BC = z_BCHW.double().std((2, 3), correction=0)
    torch.testing.assert_close(found_BC.double(), wanted_BC, rtol=1e-4, atol=1e-12)
    assert found_BC[1, 2] == 0
    assert not found_BC[2].any()
    assert not spread_of(z_BCHW[:, :, :1, :1]).any()
