"""The network from which the trunk is cut: trained on the first task, supplied by the user, or
supplied and then adapted to the first task.

A trained network is stored under a key that everything about its training determines. So the same
training is never repeated, and an interrupted one is resumed after the last epoch that was kept.

    <root>/trunks/<key>/          the finished network
    <root>/trunks/<key>.partial/  its state after the last kept epoch

Legend: N images, B batch, C channels, H W spatial, K classes.
"""

import contextlib
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs
import torch
from torch import Tensor

from partialhn.checkpoints import checkpoint
from partialhn.checkpoints.keeper import StateKeeper
from partialhn.config import Augment, BackboneConfig, Config
from partialhn.data.decode import decode, decode_to_file
from partialhn.data.experience import Experience
from partialhn.data.image_table import ImageTable
from partialhn.errors import InputError
from partialhn.features.closed_form import accuracy as accuracy_of
from partialhn.naming import FIRST_OPTIONS, digest, named_values
from partialhn.networks.backbone import (
    Network,
    build_network,
    classifier_prefix,
)
from partialhn.networks.device_memory import explained
from partialhn.networks.precision import wait_for
from partialhn.networks.supplied import supplied_network
from partialhn.networks.tensors import tensors_below
from partialhn.numbers import counted
from partialhn.pixels import Pixels
from partialhn.training.adaptation import keep_statistics, start_classifier
from partialhn.training.budget import BestState, held_out_loss, trunk_budget
from partialhn.training.choice import FEW
from partialhn.training.image_batches import Classification, ImageBatches, Labelled
from partialhn.training.optimiser import (
    AdamW,
    load_optimiser,
    optimiser_tensors,
    rate_factors,
)
from partialhn.training.records import EpochRecord
from partialhn.training.steps import StepRecorder, Steps, recorder_for

SMALL = 64
"""Largest input size, in pixels, at which the first task's images are held in memory."""
TRUNK_WEIGHT_DECAY, TRUNK_LABEL_SMOOTHING = 0.05, 0.1
"""Strong regularisation, because the trunk is trained once, on few classes, and must then serve
tasks it has not seen."""


FEW_TO_WARP = 100
"""Images a class below which the trunk's images are warped too, where passes are not given, and a
user is told how few they are (`docs/measurements/few-images.md`)."""
BATCH = 256
"""Held-out images that pass the network together."""


def network_optimiser(network: Network, config: BackboneConfig) -> torch.optim.Optimizer:
    """AdamW over all parameters of the network; its learning rate is a tensor."""
    device = network.mean_C.device
    peak = config.adapt_learning_rate if config.adapt_trunk else config.trunk_learning_rate
    rate = torch.tensor(peak, dtype=_rate_type(device), device=device)
    return AdamW([{"params": list(network.parameters()), "lr": rate, "peak": peak}], fused=True,
                 capturable=device.type == "cuda", weight_decay=TRUNK_WEIGHT_DECAY)


def _rate_type(device: torch.device) -> torch.dtype:
    """The number type of learning rates: CUDA's AdamW takes float32 alone. A CPU calculates with
    float64, and trunks that were trained there before keep their bits.
    """
    return torch.float32 if device.type == "cuda" else torch.float64


def train_network(network: Network, images: Labelled, config: BackboneConfig, kind: Augment,
                  optimiser: torch.optim.Optimizer, *, held_out: Labelled | None = None,
                  epochs_done: int = 0, best: BestState | None = None,
                  recorder: StepRecorder | None = None) -> Iterator[EpochRecord]:
    """Trains the whole network on the first task's images; its first stages become the trunk.

    Each pass augments anew; the learning rate follows a cosine. `optimiser` is
    `network_optimiser(network, config)`. Yields a record per epoch. Where passes are not given,
    training stops by the loss on `held_out`, and the network ends in its best state. best: the
    best state of the epochs done. recorder: records one step and replays it, if the images fit on
    the network's device. Raises: InputError if the loss is no longer finite.
    """
    best, device = best or BestState(), network.mean_C.device
    few = config.trunk_epochs is None and _count(images, held_out) < FEW_TO_WARP * _classes(images)
    budget = trunk_budget(config, len(images.y_N), len(held_out.y_N) if held_out else 0)
    batches = ImageBatches(images, config.trunk_batch_size, kind, config.trunk_seed, device,
                           passes=budget.passes, warped=few)
    factor_S = torch.tensor(rate_factors("cosine", batches.steps * budget.epochs),
                            dtype=torch.float64)[batches.steps * epochs_done:]
    peak_G = torch.tensor([group["peak"] for group in optimiser.param_groups], dtype=torch.float64)
    rates_SG = (factor_S[:, None] * peak_G).to(_rate_type(device))
    steps = Steps(Classification(network, config.training_arithmetic, TRUNK_LABEL_SMOOTHING),
                  optimiser, rates_SG.to(device), recorder if batches.resident else None,
                  batches.steps_1)
    for epoch in range(epochs_done + 1, budget.epochs + 1):
        if budget.patience is not None and budget.is_over(best.losses):
            break
        start = time.perf_counter()
        network.train()
        if config.adapt_trunk:
            keep_statistics(network)
        terms_3 = steps.terms_3.zero_()
        batches.begin(epoch)
        for _ in range(batches.steps):
            steps.run_next(batches)
        wait_for(device)
        loss, correct, _ = (terms_3 / batches.steps).tolist()
        if not math.isfinite(loss):
            option = ("adapt" if config.adapt_trunk else "trunk") + "_learning_rate"
            raise InputError(f"the loss of the trunk became {loss} in epoch {epoch}; allowed: a "
                             f"finite loss, so try a smaller {option} than "
                             f"{getattr(config, option)}")
        seconds, held_loss, held_accuracy = time.perf_counter() - start, None, None
        if budget.patience is not None and held_out is not None:
            held_loss, held_accuracy = _measure(network, held_out)
            best.add(held_loss, network.state_dict())
        yield EpochRecord("trunk", -1, epoch, budget.epochs, loss, loss, 0.0,
                          correct / batches.batch, held_accuracy, seconds, held_loss,
                          budget.passes)
    if best.tensors:
        network.load_state_dict(best.tensors)


@torch.no_grad()
def _measure(network: Network, held_out: Labelled) -> tuple[float, float]:
    """`held_out_loss` and accuracy on plain images."""
    network.eval()
    logits_NK = torch.cat([network(images_BCHW.to(network.mean_C.device)) for images_BCHW
                           in torch.split(held_out.images_NCHW, BATCH)])
    wait_for(logits_NK.device)
    logits_NK = logits_NK.cpu()
    return held_out_loss(logits_NK, held_out.y_N), accuracy_of(logits_NK, held_out.y_N)


def network_key(config: Config, first: Experience) -> str:
    """The key of the network that `config` trains on the first task: 32 hexadecimal digits."""
    return network_key_of(config, first.train.fingerprint(), first.transform, len(first.classes))


def network_key_of(config: Config, data: str, transform: str, classes: int) -> str:
    """As `network_key`, for a first task without its images. data: their fingerprint."""
    fields = named_values(config.backbone, FIRST_OPTIONS["backbone"]) | {
        "data": data, "transform": transform,
        "classes": classes, "input_size": config.data.input_size,
        "augment": config.features.augment, "stream_seed": config.data.stream_seed}
    del fields["freeze_depth"]
    if config.backbone.adapt_trunk:  # the weights name the network, wherever their file lies
        fields["trunk"] = _supplied_weights(config, classes).fingerprint()
    return digest(fields, 32)


def _supplied_weights(config: Config, classes: int) -> Network:
    backbone = config.backbone
    return supplied_network(backbone.trunk, backbone.backbone, classes, config.data.input_size)


def configured_supply(config: Config, classes: int = 2) -> Network:
    """The supplied network with the configured arithmetic, as the trunk is cut from it.

    Raises: InputError for one that cannot be read or does not fit.
    """
    network = _supplied_weights(config, classes)
    network.arithmetic = config.backbone.trunk_arithmetic
    return network


def load_network(config: Config, first: Experience, filesystem: pafs.FileSystem,
                 root: str) -> Network | None:
    """The network, if it is supplied or already trained and stored; otherwise None.

    Raises: InputError for a supplied network that cannot be read or does not fit.
    """
    if not config.backbone.trains_trunk:
        return configured_supply(config, len(first.classes))
    return stored_network(config, network_key(config, first), filesystem, root)


def stored_network(config: Config, key: str, filesystem: pafs.FileSystem,
                   root: str) -> Network | None:
    """The network stored under `key`, or None. The first task's images are not needed."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "network"
        if not checkpoint.fetch(filesystem, f"{root}/trunks/{key}", folder):
            return None
        tensors, fields = checkpoint.load(folder, "network")
    name = config.backbone.backbone
    network = build_network(name, len(tensors[f"{classifier_prefix(name)}bias"]),
                            input_size=config.data.input_size)
    network.load_state_dict(tensors)
    network.pixels = Pixels.from_fields(fields.get("pixels", {}))
    network.notes = tuple(fields.get("notes", ()))
    network.arithmetic = config.backbone.trunk_arithmetic
    return network


def fit_network(config: Config, first: Experience, filesystem: pafs.FileSystem, root: str,
                device: torch.device | str = "cpu") -> Iterator[EpochRecord]:
    """Trains the network on the first task, or adapts the supplied one to it, and stores it; yields
    a record per epoch.

    A thread writes its state beside the steps, at most every `KEEP_SECONDS`, and after the last
    finished epoch where the caller stops.

    Raises: InputError naming an image that cannot be read, or DeviceMemoryError if the device's
    memory does not suffice.
    """
    backbone = config.backbone
    target = f"{root}/trunks/{network_key(config, first)}"
    network = _first_network(config, len(first.classes))
    images, held_out = _decoded(config, first, first.train, network.pixels), None
    if backbone.trunk_epochs is None and len(first.validation):
        held_out = _decoded(config, first, first.validation, network.pixels)
        if _count(images, held_out) < FEW * len(first.classes):  # too few to hold some out
            images, held_out = Labelled(*(torch.cat(pair) for pair in zip(
                images, held_out, strict=True))), None
    if not backbone.adapt_trunk:
        network.set_normalisation(*(pixel_statistics if config.data.input_size <= SMALL
                                    else counted_statistics)(images.images_NCHW))
    with explained(*_memory_of(config, images, device)):
        yield from _fit(config, network, images, held_out, filesystem, target, torch.device(device))


def _fit(config: Config, network: Network, images: Labelled, held_out: Labelled | None,
         filesystem: pafs.FileSystem, target: str,
         device: torch.device) -> Iterator[EpochRecord]:
    """Trains a network on the first task's images and stores it at `target`."""
    backbone = config.backbone
    network.to(device)
    optimiser = network_optimiser(network, backbone)
    epochs_done, best = 0, BestState()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "network"
        if checkpoint.fetch(filesystem, f"{target}.partial", folder):
            tensors, fields = checkpoint.load(folder, "partial network")
            network.load_state_dict(tensors_below(tensors, "network."))
            load_optimiser(optimiser, network.named_parameters(), tensors)
            epochs_done = fields["epochs_done"]
            best = BestState(fields.get("losses", ()), tensors_below(tensors, "best."))
        elif backbone.adapt_trunk:
            start_classifier(network, *images, len(network.classifier.bias))
        recorder = recorder_for(device, config.compute.cuda_graphs)
        with StateKeeper(filesystem, f"{target}.partial", "partial network") as keeper:
            for record in train_network(network, images, backbone, config.features.augment,
                                        optimiser, held_out=held_out, epochs_done=epochs_done,
                                        best=best, recorder=recorder):
                state = {f"network.{key}": value for key, value in network.state_dict().items()}
                state |= optimiser_tensors(optimiser, network.named_parameters())
                state |= {f"best.{key}": value for key, value in best.tensors.items()}
                keeper.offer(state, {"epochs_done": record.epoch, "losses": list(best.losses)})
                yield record
        checkpoint.save(folder, "network", network.state_dict(),
                        {"pixels": network.pixels.fields(), "notes": network.notes}
                        if backbone.adapt_trunk else {})
        checkpoint.upload(folder, filesystem, target)
    with contextlib.suppress(FileNotFoundError):
        filesystem.delete_dir(f"{target}.partial")


def few_for_trunk(config: Config, first: Experience) -> str | None:
    """What a user should know of a trunk that is trained on few images of the first task; None
    where it has enough, or where there is no trunk to be trained.
    """
    count = len(first.train) + len(first.validation)
    if (config.backbone.trunk != "train" or config.backbone.depth == 0
            or count >= FEW_TO_WARP * len(first.classes)):
        return None
    return (f"the trunk learned from {counted(count, 'image')} of task {first.name!r} alone, and "
            "all tasks stand on it; a network that was trained on many photographs is far better "
            "for photographs (--trunk, docs/how-to/pretrained-trunk.md)")


def _memory_of(config: Config, images: Labelled,
               device: torch.device | str) -> tuple[str, str]:
    """What the training of the network keeps on the device, and what makes it less."""
    return (f"training the trunk at trunk_batch_size {config.backbone.trunk_batch_size} with "
            f"{images.images_NCHW.nbytes / 1e6:,.1f} MB of images on device {device}",
            "a smaller trunk_batch_size or input_size, trunk_precision bfloat16, or a device with "
            "more memory")


def _count(images: Labelled, held_out: Labelled | None) -> int:
    """Number of images of both."""
    return len(images.y_N) + (0 if held_out is None else len(held_out.y_N))


def _classes(images: Labelled) -> int:
    """Number of classes that have images."""
    return len(torch.unique(images.y_N))


def _first_network(config: Config, classes: int) -> Network:
    """The network before the first task: supplied, or freshly initialised."""
    backbone = config.backbone
    return (_supplied_weights(config, classes) if backbone.adapt_trunk else
            build_network(backbone.backbone, classes, backbone.trunk_seed, config.data.input_size))


def _decoded(config: Config, first: Experience, table: ImageTable, pixels: Pixels) -> Labelled:
    data = config.data
    decoding = decode if data.input_size <= SMALL else decode_to_file
    decoded = decoding(table, data.input_size, first.transform, data.on_bad_image,
                       data.max_image_pixels, data.stream_seed, pixels)
    return Labelled(decoded.images_BCHW,
                    torch.from_numpy(table.label_N[decoded.index_B.numpy()]))


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
