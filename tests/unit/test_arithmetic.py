"""The arithmetic of the trunk: part of every name, the same wherever features are computed."""

import dataclasses

import pytest
import torch
from pyarrow.fs import LocalFileSystem

from partialhn.checkpoints.model import Model, TaskInfo
from partialhn.config import BackboneConfig
from partialhn.networks.backbone import build_network
from partialhn.networks.cut import CutNetwork
from partialhn.networks.precision import _tf32, configure_torch
from partialhn.networks.trunk import run_trunk
from partialhn.run import cut_network
from partialhn.training.pretrain import fit_network, load_network, network_key


def with_arithmetic(config, kind):
    return dataclasses.replace(config, backbone=dataclasses.replace(
        config.backbone, trunk_arithmetic=kind))


@pytest.fixture(scope="module")
def trunks(images):
    found = {}
    for kind in ("ieee", "tf32", "bfloat16"):
        network = build_network("slim_resnet18", 2, 3)
        network.arithmetic = kind
        found[kind] = CutNetwork.of(network, 3).trunk
    return found


def test_each_arithmetic_has_its_own_features(trunks, images):
    z = {kind: run_trunk(trunk, images[:8]) for kind, trunk in trunks.items()}
    assert {value.dtype for value in z.values()} == {torch.float32}
    assert torch.equal(z["tf32"], z["ieee"])  # on a CPU
    assert not torch.equal(z["bfloat16"], z["ieee"])
    apart = (z["bfloat16"] - z["ieee"]).abs().mean() / z["ieee"].abs().mean()
    assert apart < 0.03


def test_each_arithmetic_has_its_own_names(trunks, config, digits):
    assert len({trunk.fingerprint() for trunk in trunks.values()}) == 3
    assert len({trunk.upto(2).fingerprint() for trunk in trunks.values()}) == 3
    keys = [network_key(with_arithmetic(config, kind), digits[0]) for kind in trunks]
    assert len(set(keys)) == 3
    assert keys[0] == network_key(config, digits[0])


def test_training_takes_it_too():
    assert BackboneConfig().training_arithmetic == "ieee"
    assert BackboneConfig(trunk_precision="bfloat16").training_arithmetic == "bfloat16"
    assert BackboneConfig(trunk_arithmetic="tf32").training_arithmetic == "tf32"


def test_what_is_stored_comes_back_with_it(config, digits, images, tmp_path):
    config = with_arithmetic(config, "bfloat16")
    place = (LocalFileSystem(), str(tmp_path))
    list(fit_network(config, digits[0], *place))
    cut = cut_network(config, load_network(config, digits[0], *place))
    wanted = run_trunk(cut.trunk, images[:8])
    strategy = cut.strategy(config)
    strategy.add_task(2)
    strategy.begin(0)
    strategy.finish(0)
    Model(config, cut.trunk, strategy, (TaskInfo("a", ("x", "y")),)).save(tmp_path / "model")
    assert torch.equal(run_trunk(Model.load(tmp_path / "model").trunk, images[:8]), wanted)


def test_what_a_process_sets_up_is_no_mix():
    """PyTorch refuses to say whether TF32 is allowed, which exports ask, where flags differ."""
    for _ in range(2):
        configure_torch(1)
        assert torch.backends.cudnn.allow_tf32 is False
        assert torch.backends.cuda.matmul.allow_tf32 is False
        with _tf32():
            assert torch.backends.cudnn.conv.fp32_precision == "tf32"
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
        assert torch.backends.cudnn.allow_tf32 is False
