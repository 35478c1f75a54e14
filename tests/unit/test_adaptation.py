"""A supplied trunk that is adapted to the first task before it is frozen."""

import pyarrow.fs as pafs
import pytest
import torch

from partialhn.config import Config
from partialhn.data.datasets import open_stream
from partialhn.errors import InputError
from partialhn.networks.backbone import build_network
from partialhn.run import run_stream
from partialhn.training.adaptation import start_classifier
from partialhn.training.image_batches import Labelled
from partialhn.training.pretrain import (
    fit_network,
    load_network,
    network_key,
    network_optimiser,
    train_network,
)

LOCAL = pafs.LocalFileSystem()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file with the weights of a network of timm, which nobody has trained."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "vit.pt"
    torch.save(timm.create_model("test_vit").state_dict(), path)
    return path


def configured(weights, **options):
    return Config.from_dict({
        "data": {"data": "digits", "tasks": 5, "images_per_class": 20, "input_size": 96},
        "backbone": {"backbone": "timm:test_vit", "trunk": str(weights), "freeze_depth": 3,
                     "trunk_epochs": 1, **options},
        "features": {"views": 1}, "train": {"epochs": 1}})


@pytest.fixture(scope="module")
def adapted(weights, tmp_path_factory):
    """(configuration, first task, folder) of a network that is adapted."""
    config = configured(weights, adapt_trunk=True)
    folder = tmp_path_factory.mktemp("adapted")
    first = open_stream(config.data, folder)[0]
    (record,) = fit_network(config, first, LOCAL, str(folder))
    assert record.task_index == -1
    return config, first, folder


def test_the_weights_move_and_the_pixels_stay(adapted, weights):
    config, first, folder = adapted
    plain = load_network(configured(weights), first, LOCAL, str(folder))
    network = load_network(config, first, LOCAL, str(folder))
    assert network.pixels == plain.pixels
    assert network.pixels.geometry == "bicubic/0.95"
    assert torch.equal(network.mean_C, plain.mean_C)
    assert network.notes == plain.notes
    assert network.notes
    assert network.fingerprint() != plain.fingerprint()
    moved = [(network.body.state_dict()[key] - value).abs().max().item()
             for key, value in plain.body.named_parameters()
             if not key.startswith(plain.backbone.classifier)]
    assert 0 < max(moved) < 0.01  # AdamW moves a weight by about its rate in a step


def test_the_rate_is_the_rate_of_adaptation(adapted, weights, tmp_path):
    config, first, folder = adapted
    slow = configured(weights, adapt_trunk=True, adapt_learning_rate=1e-12)
    list(fit_network(slow, first, LOCAL, str(tmp_path)))
    plain = load_network(configured(weights), first, LOCAL, str(tmp_path))
    still, moved = (load_network(each, first, LOCAL, str(root))
                    for each, root in ((slow, tmp_path), (config, folder)))
    for key, value in plain.without_classifier().items():
        assert torch.allclose(still.state_dict()[key], value, atol=1e-8), key
    assert not torch.allclose(still.classifier.weight, moved.classifier.weight)


def test_the_key_is_that_of_the_weights_wherever_they_lie(adapted, weights, tmp_path):
    config, first, _ = adapted
    copy = tmp_path / "copy.pt"
    copy.write_bytes(weights.read_bytes())
    assert network_key(config, first) == network_key(configured(copy, adapt_trunk=True), first)
    tensors = torch.load(weights)
    tensors["norm.bias"] += 1
    torch.save(tensors, copy)
    assert network_key(config, first) != network_key(configured(copy, adapt_trunk=True), first)


def test_an_interrupted_adaptation_goes_on(weights, tmp_path):
    config = configured(weights, adapt_trunk=True, trunk_epochs=2)
    first = open_stream(config.data, tmp_path)[0]

    def fit(root, epochs):
        records = fit_network(config, first, LOCAL, str(root))
        for _ in range(epochs):
            next(records)
        records.close()
        list(fit_network(config, first, LOCAL, str(root)))
        return load_network(config, first, LOCAL, str(root))

    assert fit(tmp_path / "one", 0).fingerprint() == fit(tmp_path / "two", 1).fingerprint()


def test_the_classifier_starts_as_ridge_regression(image_tensors):
    images_NCHW, y_N = image_tensors
    network = build_network("slim_resnet18", 2)
    before = network.fingerprint()
    start_classifier(network, images_NCHW, y_N, 2)
    assert network.fingerprint() == before  # statistics of BatchNorm included
    with torch.no_grad():
        right = network(images_NCHW).argmax(1) == y_N
    assert right.float().mean() > 0.9


@pytest.fixture
def image_tensors():
    """Dark and bright noise: (N, 3, 32, 32) uint8, and labels."""
    generator = torch.Generator().manual_seed(0)
    y_N = torch.arange(40) % 2
    noise = torch.randint(0, 100, (40, 3, 32, 32), generator=generator)
    return (noise + 100 * y_N[:, None, None, None]).to(torch.uint8), y_N


def test_batch_norms_keep_their_statistics(image_tensors):
    images, config = Labelled(*image_tensors), configured("x.pt", adapt_trunk=True).backbone
    network = build_network("slim_resnet18", 2)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    (_,) = train_network(network, images, config, "none", network_optimiser(network, config))
    after = network.state_dict()
    assert not torch.equal(after["body.layer1.0.bn1.weight"], before["body.layer1.0.bn1.weight"])
    statistics = [name for name in after if "running" in name or "tracked" in name]
    assert statistics
    for name in statistics:
        assert torch.equal(after[name], before[name]), name


def test_a_stream_is_learned_on_the_adapted_trunk(adapted):
    config, _, folder = adapted
    result = run_stream(config, folder)
    network = load_network(config, open_stream(config.data, folder)[0], LOCAL, str(folder))
    trunk = result.model.trunk
    assert trunk.pixels.geometry == "bicubic/0.95"
    own = {f"stages.{number}.{key}": value
           for number, block in enumerate(list(network.blocks().values())[:3])
           for key, value in block.state_dict().items()}
    for key, value in own.items():
        assert torch.equal(trunk.state_dict()[key], value), key


def test_a_trained_trunk_is_not_adapted():
    with pytest.raises(InputError, match=r"adapt_trunk is True; allowed: false where trunk is "
                                         r"train"):
        Config.from_dict({"backbone": {"adapt_trunk": True}})
    with pytest.raises(InputError, match=r"adapt_learning_rate is 0"):
        Config.from_dict({"backbone": {"trunk": "x", "adapt_learning_rate": 0.0}})
