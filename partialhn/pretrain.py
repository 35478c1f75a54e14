"""The network that the trunk is cut from: trained on the first task, or supplied.

A trained network is kept under a name that says all that determines it, so the same work is
found again, and a training that was stopped goes on after its last finished epoch.

    <root>/trunks/<key>/          the finished network
    <root>/trunks/<key>.partial/  its state after the last finished epoch

Legend: N images, C channels, H W spatial.
"""

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs
import torch

from partialhn import checkpoint
from partialhn.backbone import Network, build_network, supplied_network, tensors_below
from partialhn.config import Config
from partialhn.datasets import decode
from partialhn.stream import Experience
from partialhn.train import (
    EpochRecord,
    load_optimiser,
    network_optimiser,
    optimiser_tensors,
    train_network,
)


def network_key(config: Config, first: Experience) -> str:
    """Names the network that `config` trains on the first task: 32 hexadecimal digits."""
    fields = dataclasses.asdict(config.backbone) | {
        "data": first.train.fingerprint(), "transform": first.transform,
        "classes": len(first.classes), "input_size": config.data.input_size,
        "augment": config.features.augment, "stream_seed": config.data.stream_seed}
    del fields["freeze_depth"]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:32]


def load_network(config: Config, first: Experience, filesystem: pafs.FileSystem,
                 root: str) -> Network | None:
    """The network where it needs no training: supplied, or trained before. Otherwise None.

    Raises: InputError for a supplied network that cannot be had or does not fit.
    """
    backbone = config.backbone
    if backbone.trunk != "train":
        return supplied_network(backbone.trunk, backbone.backbone, len(first.classes))
    return stored_network(config, network_key(config, first), filesystem, root)


def stored_network(config: Config, key: str, filesystem: pafs.FileSystem,
                   root: str) -> Network | None:
    """A network by the name it was stored under, or None: the first task need not be there."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "network"
        if not checkpoint.fetch(filesystem, f"{root}/trunks/{key}", folder):
            return None
        tensors, _ = checkpoint.load(folder, "network")
    network = build_network(config.backbone.backbone, len(tensors["body.fc.bias"]))
    network.load_state_dict(tensors)
    return network


def fit_network(config: Config, first: Experience, filesystem: pafs.FileSystem, root: str,
                device: torch.device | str = "cpu") -> Iterator[EpochRecord]:
    """Trains the network on the first task, storing it when done; yields a record per epoch.

    Raises: InputError naming an image that cannot be read.
    """
    backbone = config.backbone
    target = f"{root}/trunks/{network_key(config, first)}"
    decoded = decode(first.train, config.data.input_size, first.transform,
                     config.data.on_bad_image, config.data.max_image_pixels,
                     config.data.stream_seed)
    images_NCHW = decoded.images_BCHW
    y_N = torch.from_numpy(first.train.label_N[decoded.index_B.numpy()])
    network = build_network(backbone.backbone, len(first.classes), backbone.trunk_seed)
    _measure_pixels(network, images_NCHW)
    network.to(device)
    optimiser = network_optimiser(network, backbone)
    epochs_done = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "network"
        if checkpoint.fetch(filesystem, f"{target}.partial", folder):
            tensors, fields = checkpoint.load(folder, "partial network")
            network.load_state_dict(tensors_below(tensors, "network."))
            load_optimiser(optimiser, network.named_parameters(), tensors)
            epochs_done = fields["epochs_done"]
        for record in train_network(network, images_NCHW, y_N, backbone, config.features.augment,
                                    optimiser, epochs_done=epochs_done):
            state = {f"network.{key}": value for key, value in network.state_dict().items()}
            state |= optimiser_tensors(optimiser, network.named_parameters())
            checkpoint.save(folder, "partial network", state, {"epochs_done": record.epoch})
            checkpoint.upload(folder, filesystem, f"{target}.partial")
            yield record
        checkpoint.save(folder, "network", network.state_dict(), {})
        checkpoint.upload(folder, filesystem, target)
    filesystem.delete_dir(f"{target}.partial")


def _measure_pixels(network: Network, images_NCHW: torch.Tensor) -> None:
    """Sets the network's normalisation to the mean and spread of its training images."""
    pixels_NCHW = images_NCHW.float() / 255
    network.mean_C.copy_(pixels_NCHW.mean((0, 2, 3)))
    network.std_C.copy_(pixels_NCHW.std((0, 2, 3)).clamp_min(1e-3))
