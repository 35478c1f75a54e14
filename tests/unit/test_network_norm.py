"""Heads whose batch norms keep the statistics of the network that they start from.

Legend: B batch, C channels, H W spatial, N images, F features, K classes.
"""

import dataclasses

import pytest
import torch

from partialhn.config import BackboneConfig, Config, HypernetConfig
from partialhn.errors import InputError
from partialhn.features.closed_form import fit_ridge
from partialhn.networks.backbone import pooled
from partialhn.networks.head import HeadWeights
from partialhn.networks.tensors import hash_tensors
from partialhn.run import cut_network
from partialhn.strategies import STRATEGIES
from partialhn.training.answers import answer, embedded
from partialhn.training.learner import Learner
from pipelines.retrain.run import _config
from pipelines.settings import RetrainConfig

KINDS = ("partial_hn", "separate_heads", "latent_replay")


@pytest.fixture(scope="module")
def parts(network, with_options):
    """Trunk and head at depth 3 with norm `network`, and the configuration."""
    config = with_options(hypernet={"starts_from": "network", "norm": "network"})
    return cut_network(config, network), config


@pytest.fixture
def learner(parts):
    def new(kind, **options):
        cut, config = parts
        config = dataclasses.replace(config, train=dataclasses.replace(
            config.train, strategy=kind, **options))
        return Learner(cut.strategy(config), config.train)
    return new


@torch.no_grad()
def test_while_a_task_is_learned_the_head_gives_what_the_network_gives(parts, network, images):
    cut, _ = parts
    z_BCHW = wanted_BF = cut.trunk(images[:7])
    for block in list(network.blocks().values())[-len(cut.head.blocks):]:
        wanted_BF = block(wanted_BF)
    statistics = cut.head.first_statistics()
    before = statistics.clone()
    none = torch.zeros(2, cut.head.width)
    weights = HeadWeights(cut.head.named(cut.start.matrices), cut.start.norm, none, none[:, 0],
                          statistics)
    found_BF = cut.head.train().embed(z_BCHW, weights)
    torch.testing.assert_close(found_BF, pooled(wanted_BF), rtol=1e-4, atol=1e-5)
    assert torch.equal(statistics, before)
    assert not torch.equal(cut.head.first_statistics(), torch.zeros_like(before))


@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_starts_as_ridge_regression_on_the_networks_head(kind, learner, tasks):
    """A rate of nearly zero leaves it as it started."""
    learned = learner(kind, learning_rate=1e-9, epochs=1)
    list(learned.fit_next(tasks[:1]))
    x_NF, y_N = embedded(learned.strategy, 0, tasks[0].train)
    ridge = fit_ridge(x_NF, y_N, 2).sharpened(y_N)
    found_NK, _ = answer(learned.strategy, 0, tasks[0].train)
    torch.testing.assert_close(found_NK, ridge.logits(x_NF.double()).float(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_task_goes_on_and_does_not_start_at_ridge_again(kind, learner, tasks):
    whole, first, second = (learner(kind) for _ in range(3))
    list(whole.learn(tasks[:2]))
    running = first.learn(tasks[:2])
    for record in running:
        if getattr(record, "epoch", 0) == 1 and record.task_index == 1:
            break
    second.restore(*first.state())
    list(second.learn(tasks[:2]))
    assert second.epochs == [dataclasses.replace(record, seconds=own.seconds) for record, own
                             in zip(whole.epochs, second.epochs, strict=True)]
    assert hash_tensors(second.strategy.state_dict()) == hash_tensors(whole.strategy.state_dict())


def test_the_rate_is_lower(parts, cut, config):
    lower, full = (STRATEGIES["separate_heads"](each.head, each.start, config)
                   for each in (parts[0], cut))
    for strategy in (lower, full):
        strategy.add_task(2)
        strategy.begin(0)
    (low,), (high,) = (strategy.parameter_groups(1.0) for strategy in (lower, full))
    assert low["peak"] < high["peak"] == 1.0


def test_a_pretrained_trunk_keeps_its_statistics_and_one_trained_here_does_not():
    elsewhere = BackboneConfig(backbone="timm:resnet18", trunk="some.safetensors")
    assert Config(backbone=elsewhere).hypernet.norm == "network"
    assert Config().hypernet.norm == "batch"
    asked = Config(backbone=elsewhere, hypernet=HypernetConfig(norm="batch"))
    assert asked.hypernet.norm == "batch"
    assert asked.work_hash() != Config(backbone=elsewhere).work_hash()


def test_a_stream_keeps_the_norm_that_it_began_with(tmp_path):
    """Earlier commits learned with the batch's statistics on such a trunk, too."""
    file = tmp_path / "c.yaml"
    text = "backbone: {backbone: 'timm:convnext_tiny', trunk: some.safetensors, freeze_depth: 3}\n"
    file.write_text(text, encoding="utf-8")
    settings = RetrainConfig(name="s", config=str(file))
    new = _config(settings, None)
    begun = dataclasses.replace(new, hypernet=dataclasses.replace(new.hypernet, norm="batch"))
    assert new.hypernet.norm == "network"
    assert _config(settings, begun.to_dict()).hypernet == begun.hypernet
    file.write_text(f"hypernet: {{norm: network}}\n{text}", encoding="utf-8")
    with pytest.raises(InputError, match=r"hypernet\.norm is 'network', .* started with 'batch'"):
        _config(settings, begun.to_dict())
