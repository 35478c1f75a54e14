"""The network from which the trunk is cut: trained on the first task, or supplied by the user.

A trained network is stored under a key that everything about its training determines. So the same
training is never repeated, and an interrupted one is resumed after its last finished epoch.

    <root>/trunks/<key>/          the finished network
    <root>/trunks/<key>.partial/  its state after the last finished epoch

Legend: N images, B batch, C channels, H W spatial, K classes.
"""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.fs as pafs
import torch
from torch import Tensor, nn

from partialhn.checkpoints import checkpoint
from partialhn.config import Augment, BackboneConfig, Config
from partialhn.data.augment import augment
from partialhn.data.decode import decode, decode_to_file
from partialhn.data.experience import Experience
from partialhn.naming import FIRST_OPTIONS, digest, named_values
from partialhn.networks.backbone import (
    Network,
    build_network,
    classifier_prefix,
)
from partialhn.networks.precision import autocast_to
from partialhn.networks.supplied import supplied_network
from partialhn.networks.tensors import tensors_below
from partialhn.training.optimiser import (
    load_optimiser,
    optimiser_tensors,
    rate_factors,
)
from partialhn.training.records import EpochRecord

SMALL = 64
"""Largest input size, in pixels, at which the first task's images are held in memory."""
TRUNK_WEIGHT_DECAY, TRUNK_LABEL_SMOOTHING = 0.05, 0.1
"""Strong regularisation, because the trunk is trained once, on few classes, and must then serve
tasks it has not seen."""


def network_optimiser(network: Network, config: BackboneConfig) -> torch.optim.Optimizer:
    """AdamW over all parameters of the network."""
    return torch.optim.AdamW([{"params": list(network.parameters()),
                               "peak": config.trunk_learning_rate}], fused=True,
                             weight_decay=TRUNK_WEIGHT_DECAY)


def train_network(network: Network, images_NCHW: Tensor, y_N: Tensor, config: BackboneConfig,
                  kind: Augment, optimiser: torch.optim.Optimizer, *,
                  epochs_done: int = 0) -> Iterator[EpochRecord]:
    """Trains the whole network on the first task's images; its first stages become the trunk.

    images_NCHW: uint8; y_N: int64 labels. Each epoch augments anew; the learning rate follows a
    cosine. `optimiser` is `network_optimiser(network, config)`. Yields a record per epoch.
    """
    device = network.mean_C.device
    size = min(config.trunk_batch_size, len(y_N))
    steps = len(y_N) // size
    rates = rate_factors("cosine", steps * config.trunk_epochs)
    for epoch in range(epochs_done + 1, config.trunk_epochs + 1):
        start = time.perf_counter()
        network.train()
        order_N = np.random.default_rng([config.trunk_seed, epoch]).permutation(len(y_N))
        totals = torch.zeros(2, device=device)
        for step in range(steps):
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * rates[(epoch - 1) * steps + step]
            rows_B = order_N[step * size:(step + 1) * size]
            images_BCHW = augment(images_NCHW[rows_B].to(device), rows_B, len(y_N), epoch, kind,
                                  config.trunk_seed)
            y_B = y_N[rows_B].to(device)
            with autocast_to(config.trunk_precision, device):
                logits_BK = network(images_BCHW).float()
            loss = nn.functional.cross_entropy(logits_BK, y_B,
                                               label_smoothing=TRUNK_LABEL_SMOOTHING)
            optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimiser.step()
            totals += torch.stack([loss.detach(), (logits_BK.argmax(1) == y_B).float().mean()])
        mean_loss, accuracy = (totals / steps).tolist()
        yield EpochRecord("trunk", -1, epoch, config.trunk_epochs, mean_loss, mean_loss, 0.0,
                          accuracy, None, time.perf_counter() - start)


def network_key(config: Config, first: Experience) -> str:
    """The key of the network that `config` trains on the first task: 32 hexadecimal digits."""
    fields = named_values(config.backbone, FIRST_OPTIONS["backbone"]) | {
        "data": first.train.fingerprint(), "transform": first.transform,
        "classes": len(first.classes), "input_size": config.data.input_size,
        "augment": config.features.augment, "stream_seed": config.data.stream_seed}
    del fields["freeze_depth"]
    return digest(fields, 32)


def load_network(config: Config, first: Experience, filesystem: pafs.FileSystem,
                 root: str) -> Network | None:
    """The network, if it is supplied or already trained and stored; otherwise None.

    Raises: InputError for a supplied network that cannot be read or does not fit.
    """
    backbone = config.backbone
    if backbone.trunk != "train":
        return supplied_network(backbone.trunk, backbone.backbone, len(first.classes))
    return stored_network(config, network_key(config, first), filesystem, root)


def stored_network(config: Config, key: str, filesystem: pafs.FileSystem,
                   root: str) -> Network | None:
    """The network stored under `key`, or None. The first task's images are not needed."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "network"
        if not checkpoint.fetch(filesystem, f"{root}/trunks/{key}", folder):
            return None
        tensors, _ = checkpoint.load(folder, "network")
    name = config.backbone.backbone
    network = build_network(name, len(tensors[f"{classifier_prefix(name)}bias"]),
                            input_size=config.data.input_size)
    network.load_state_dict(tensors)
    return network


def fit_network(config: Config, first: Experience, filesystem: pafs.FileSystem, root: str,
                device: torch.device | str = "cpu") -> Iterator[EpochRecord]:
    """Trains the network on the first task and stores it; yields a record per epoch.

    Raises: InputError naming an image that cannot be read.
    """
    backbone = config.backbone
    target = f"{root}/trunks/{network_key(config, first)}"
    data = config.data
    decoding = decode if data.input_size <= SMALL else decode_to_file
    decoded = decoding(first.train, data.input_size, first.transform, data.on_bad_image,
                       data.max_image_pixels, data.stream_seed)
    images_NCHW = decoded.images_BCHW
    y_N = torch.from_numpy(first.train.label_N[decoded.index_B.numpy()])
    network = build_network(backbone.backbone, len(first.classes), backbone.trunk_seed,
                            data.input_size)
    network.set_normalisation(*(pixel_statistics if data.input_size <= SMALL
                                else counted_statistics)(images_NCHW))
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


def pixel_statistics(images_NCHW: Tensor) -> tuple[Tensor, Tensor]:
    """mean_C and std_C of uint8 images in memory, in units of a pixel scaled to 0..1."""
    pixels_NCHW = images_NCHW.float() / 255
    return pixels_NCHW.mean((0, 2, 3)), pixels_NCHW.std((0, 2, 3)).clamp_min(1e-3)


def counted_statistics(images_NCHW: Tensor) -> tuple[Tensor, Tensor]:
    """The same from the count of each of the 256 values, image by image, so that no images are in
    memory as float32; rounding may differ.
    """
    count_CV = torch.zeros(images_NCHW.shape[1], 256, dtype=torch.int64)
    for image_CHW in images_NCHW:
        for channel, pixels_HW in enumerate(image_CHW):
            count_CV[channel] += torch.bincount(pixels_HW.flatten().int(), minlength=256)
    value_V, total = torch.arange(256, dtype=torch.float64) / 255, count_CV.sum(1)
    mean_C = (count_CV * value_V).sum(1) / total
    square_C = (count_CV * (value_V - mean_C[:, None]) ** 2).sum(1)
    return mean_C.float(), (square_C / (total - 1)).sqrt().float().clamp_min(1e-3)
