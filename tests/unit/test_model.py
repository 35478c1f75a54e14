"""The head: against the published formulation, batch norm and its folding, the norms."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from partialhn.config import Config, HypernetConfig
from partialhn.errors import InputError
from partialhn.networks.backbone import build_network
from partialhn.networks.cut import CutNetwork
from partialhn.networks.head import Head, HeadWeights, check_feature_size, head_start
from partialhn.strategies.partial_hn import PartialHypernet
from partialhn.strategies.separate_heads import SeparateHeads


def hypernet(network, depth, **options):
    config = Config(hypernet=dataclasses.replace(
        HypernetConfig(code_dim=8, fresh_columns=4, hidden=(6, 5), channel_dim=4), **options))
    cut, norm = CutNetwork.of(network, depth), config.hypernet.norm
    head = Head(cut, norm, config.hypernet.norm_groups)
    return PartialHypernet(head, head_start(cut, norm, 0), config)


def published_forward(strategy, network, depth, z_BCHW, task):
    """Weights generated for every sample and applied with vmap, BatchNorm over one sample.

    Under vmap each sample has a network of its own, and so BatchNorm sees a batch of one.
    """
    own, generator = strategy.tasks[task], strategy.hypernet
    stages = CutNetwork.of(network, depth).stages.train()
    torch.func.replace_all_batch_norm_modules_(stages)
    names = [name for name, value in stages.named_parameters() if value.dim() == 4]
    norms = [name for name, layer in stages.named_modules() if isinstance(layer, nn.BatchNorm2d)]
    shapes = {name: value.shape for name, value in stages.named_parameters()}
    scales, shifts = own.norm.chunk(2)
    widths = [shapes[f"{name}.weight"][0] for name in norms]
    affine = {f"{name}.{kind}": value for kind, values in (("weight", scales), ("bias", shifts))
              for name, value in zip(norms, values.split(widths), strict=True)} if norms else {}

    def generate(code):
        x = generator.mlp(code)
        weights = {}
        for index, name in enumerate(names):
            rows = [generator.A[index] @ torch.cat([x, row]) + generator.b[index]
                    for row in generator.v[index]]
            weights[name] = torch.stack(rows).view(shapes[name])
        return weights

    def one(z_CHW, code):
        if not norms:  # our linear head scales and shifts what the trunk has pooled
            z_F = z_CHW.mean((1, 2)) / (1 + 1e-5)**0.5  # standardised by statistics of nothing
            return (z_F * scales + shifts) @ own.classifier_KF.T + own.bias_K
        out = torch.func.functional_call(stages, generate(code) | affine, (z_CHW[None],))
        return out.mean((2, 3))[0] @ own.classifier_KF.T + own.bias_K

    codes_BE = own.code.expand(len(z_BCHW), -1)
    return torch.func.vmap(one)(z_BCHW, codes_BE)


@pytest.mark.parametrize("depth", range(5))
def test_forward_equals_the_published_formulation(network, images, depth):
    """In float64: norms of a map of few values magnify the rounding of float32."""
    z_BCHW = CutNetwork.of(network, depth).trunk(images[:3]).double()
    network = copy.deepcopy(network).double()
    strategy = hypernet(network, depth, generator="additive", norm="instance", residual=False)
    strategy.add_task(3)
    strategy.add_task(2)
    strategy.double()
    with torch.no_grad():
        for own in strategy.tasks:
            own.norm.copy_(1 + 0.3 * torch.randn(len(own.norm)))
            own.code.normal_()
    strategy.eval()
    for task in range(2):
        with torch.no_grad():
            wanted = published_forward(strategy, network, depth, z_BCHW, task)
            found = strategy(z_BCHW, task)
        assert found.shape == (3, 3 - task)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert (wanted[0] - wanted[1]).abs().max() > 1e-3


def own_weights(network, head, stages):
    norms = [layer for layer in stages.modules() if isinstance(layer, nn.BatchNorm2d)]
    convolutions = [value for value in stages.parameters() if value.dim() == 4]

    def joined(*kinds):
        return torch.cat([getattr(layer, kind) for kind in kinds for layer in norms])

    if not norms:  # a linear head: standardised by what changes nothing
        one, zero = torch.ones(head.width), torch.zeros(head.width)
        return HeadWeights({}, torch.cat([one, zero]), network.body.fc.weight,
                           network.body.fc.bias, torch.cat([zero, one - 1e-5]))
    return HeadWeights(head.named(convolutions), joined("weight", "bias"), network.body.fc.weight,
                       network.body.fc.bias, joined("running_mean", "running_var"))


@pytest.mark.parametrize("depth", range(5))
def test_trunk_and_head_with_the_networks_weights_are_the_network(network, images, depth):
    cut = CutNetwork.of(network, depth)
    trunk, stages = cut.trunk, cut.stages
    head = Head(cut, "batch", 8).eval()
    weights = own_weights(network, head, stages)
    with torch.no_grad():
        wanted = network(images[:8])
        found = head(trunk(images[:8]), weights)
        folded = weights._replace(norm=head.fold(weights.norm, weights.statistics),
                                  statistics=None)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(head(trunk(images[:8]), folded), wanted, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def learned(network, images):
    """A batch-norm task after some forward passes: running statistics, not folded yet."""
    cut = CutNetwork.of(network, 3)
    strategy = SeparateHeads(Head(cut, "batch", 8), head_start(cut, "batch", 0), Config())
    strategy.add_task(3)
    z_BCHW = CutNetwork.of(network, 3).trunk(images)
    strategy.train()
    with torch.no_grad():
        for _ in range(10):
            strategy(z_BCHW[:64], 0)
    return strategy.eval(), z_BCHW


@torch.no_grad()
def test_folding_changes_no_answer(learned):
    strategy, z_BCHW = copy.deepcopy(learned[0]), learned[1]
    before = strategy(z_BCHW, 0)
    statistics = strategy.tasks[0].statistics.clone()
    strategy.finish(0)
    assert strategy.tasks[0].statistics is None
    torch.testing.assert_close(strategy(z_BCHW, 0), before, rtol=1e-5, atol=1e-5)
    start = strategy.head.first_statistics()
    assert (statistics - start).abs().max() > 0.05


@torch.no_grad()
def test_a_learned_task_keeps_eleven_bits_of_norm_and_classifier(network, images):
    strategy = hypernet(network, 3, norm="batch")
    strategy.add_task(3)
    z_BCHW = CutNetwork.of(network, 3).trunk(images)
    for _ in range(10):
        strategy.train()(z_BCHW[:64], 0)
    before = strategy.eval()(z_BCHW, 0)
    strategy.finish(0)
    assert {value.dtype for name, value in strategy.tasks[0].named_parameters()
            if name != "code"} == {torch.float16}
    after = strategy(z_BCHW, 0)
    assert after.dtype == torch.float32
    assert 0 < (after - before).abs().max() < 2e-3 * before.abs().max()


@torch.no_grad()
def test_after_folding_an_answer_depends_on_no_other_image(learned):
    strategy, z_BCHW = copy.deepcopy(learned[0]), learned[1]
    strategy.finish(0)
    together = strategy(z_BCHW[:64], 0)
    alone = torch.cat([strategy(z_BCHW[i:i + 1], 0) for i in range(64)])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_while_learning_batch_norm_sees_the_batch(learned):
    strategy, z_BCHW = copy.deepcopy(learned[0]).train(), learned[1]
    assert (strategy(z_BCHW[:2], 0)[0] - strategy(z_BCHW[:64], 0)[0]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("norm", ["instance", "group", "layer"])
def test_other_norms_see_one_image_even_while_learning(network, images, norm):
    strategy = hypernet(network, 3, norm=norm, norm_groups=8).train()
    strategy.add_task(3)
    z_BCHW = CutNetwork.of(network, 3).trunk(images[:16])
    alone = torch.cat([strategy(z_BCHW[i:i + 1], 0) for i in range(16)])
    torch.testing.assert_close(strategy(z_BCHW, 0), alone, rtol=1e-5, atol=1e-5)
    assert strategy.tasks[0].statistics is None


def test_the_head_owns_no_weight(network):
    head = Head(CutNetwork.of(network, 2), "batch", 8)
    assert not list(head.parameters())
    assert not head.state_dict()
    wanted = sum(value.numel() for value in CutNetwork.of(network, 2).stages.parameters()
                 if value.dim() == 4)
    assert head.weight_count == wanted


def test_a_head_starts_from_the_network_with_batch_norm_and_anew_with_others(network):
    own = [v for v in CutNetwork.of(network, 3).stages.parameters() if v.dim() == 4]
    cut = CutNetwork.of(network, 3)
    batch, group = head_start(cut, "batch", 0), head_start(cut, "group", 0)
    assert all(torch.equal(a, b) for a, b in zip(batch.matrices, own, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(group.matrices, own, strict=True))
    assert group.norm.unique().tolist() == [0, 1]
    again, other = head_start(cut, "group", 0), head_start(cut, "group", 1)
    assert torch.equal(again.matrices[0], group.matrices[0])
    assert not torch.equal(other.matrices[0], group.matrices[0])


def test_missing_and_extra_weights_raise(network, images):
    cut = CutNetwork.of(network, 3)
    head, start = Head(cut, "instance", 8), head_start(cut, "instance", 0)
    weights = HeadWeights(head.named(start.matrices), start.norm, torch.zeros(2, 160),
                          torch.zeros(2))
    z_BCHW = CutNetwork.of(network, 3).trunk(images[:2])
    name = next(iter(weights.matrices))
    less = {key: value for key, value in weights.matrices.items() if key != name}
    with pytest.raises(RuntimeError, match=name):
        head(z_BCHW, weights._replace(matrices=less))
    with pytest.raises(RuntimeError, match="surplus"):
        head(z_BCHW, weights._replace(
            matrices=weights.matrices | {"surplus": torch.zeros(1)}))


def test_groups_must_divide_every_width(network):
    with pytest.raises(InputError, match="norm_groups is 7; allowed: a divisor"):
        Head(CutNetwork.of(network, 3), "group", 7)


def test_instance_norm_over_a_single_pixel_is_refused():
    network = build_network("resnet18", 2)
    with pytest.raises(InputError, match=r"input_size 32 .* single pixel, .* larger input_size"):
        check_feature_size("instance", CutNetwork.of(network, 3), 32)
    check_feature_size("instance", CutNetwork.of(network, 3), 64)
    check_feature_size("group", CutNetwork.of(network, 3), 32)
    check_feature_size("instance", CutNetwork.of(network, 4), 32)
