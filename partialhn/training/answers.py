"""What a strategy makes of stored images: features of a task's head, logits, and accuracy.

Legend: N images, F features that the classifier sees, E those of earlier blocks, K classes,
B batch, C channels, H W spatial.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from partialhn.detector.expansion import seen_blocks
from partialhn.features.batches import RESIDENT_BYTES
from partialhn.features.closed_form import accuracy
from partialhn.features.feature_set import FeatureSet
from partialhn.networks.device_memory import fits
from partialhn.networks.head import HeadWeights
from partialhn.networks.precision import wait_for
from partialhn.strategies import Strategy


def evaluate(strategy: Strategy, task_index: int, features: FeatureSet) -> float:
    """Accuracy on a split, 0 to 1, on the plain view."""
    return accuracy(*answer(strategy, task_index, features))


def answer(strategy: Strategy, task_index: int, features: FeatureSet, batch_size: int = 256,
           rows_N: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """logits_NK and labels y_N of the plain view of a split, on the CPU.

    rows_N: the images to answer; default: all of them.
    """
    return _outputs(strategy, task_index, features, strategy.head, batch_size, rows_N)


def embedded(strategy: Strategy, task_index: int, features: FeatureSet,
             rows_N: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Features x_NF that the task's classifier sees, and labels, as `answer` gives logits."""
    return _outputs(strategy, task_index, features, strategy.head.embed, 256, rows_N)


def network_features(strategy: Strategy, features: FeatureSet, blocks: Sequence[int]) -> Tensor:
    """What the network's own head makes of the plain view of a split, (N, F + E) on the CPU, for a
    strategy with a `reference_norm`: the features of its last block, then the means of the trunk's
    channels and of what earlier blocks give.

    blocks: their numbers above the cut (`earlier_blocks`).
    """
    norm = strategy.reference_norm
    assert norm is not None, "tasks start from the network's own weights"
    strategy.eval()

    def seen(z_BCHW: Tensor) -> Tensor:
        last_BF, *means = strategy.reference_features(z_BCHW, norm, [-1, *blocks])
        return torch.cat([last_BF, z_BCHW.to(last_BF).mean((2, 3)), *means], 1)
    return _in_batches(features, norm.device, 256, None, seen)


def earlier_blocks(strategy: Strategy, shape_CHW: tuple[int, ...]) -> tuple[int, ...]:
    """The blocks of the network's own head before the last whose means a classifier sees, too.

    shape_CHW: shape of an image's features.
    """
    norm = strategy.reference_norm
    assert norm is not None, "tasks start from the network's own weights"
    *earlier, _ = strategy.reference_features(torch.zeros(1, *shape_CHW), norm)
    return seen_blocks([e_1F.shape[1] for e_1F in earlier])


@torch.no_grad()
def _outputs(strategy: Strategy, task_index: int, features: FeatureSet,
             compute: Callable[[Tensor, HeadWeights], Tensor], batch_size: int,
             rows_N: Tensor | None) -> tuple[Tensor, Tensor]:
    """What `compute` makes of the images; the task's weights are generated once."""
    strategy.eval()
    weights = strategy.weights(task_index)
    outputs_N = _in_batches(features, weights.bias_K.device, batch_size, rows_N,
                            lambda z_BCHW: compute(z_BCHW, weights))
    y_N = features.y_N.cpu()
    return outputs_N, y_N if rows_N is None else y_N[rows_N.cpu()]


def _in_batches(features: FeatureSet, device: torch.device, batch_size: int,
                rows_N: Tensor | None, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """What `compute` makes of the plain view, batch by batch, on the CPU; default: all images."""
    features = features if device.type == "cpu" else resident(features, device)
    if rows_N is None:
        rows_N = torch.arange(len(features))
    parts = []
    for rows_B in torch.split(rows_N.to(features.y_N.device), batch_size):
        parts.append(compute(features.gather(rows_B, torch.zeros_like(rows_B)).to(device)))
    wait_for(device)
    return torch.cat(parts).cpu()


def resident(features: FeatureSet, device: torch.device) -> FeatureSet:
    """The features as one tensor on the device if they fit; otherwise unchanged."""
    if device.type != "cpu" and features.y_N.device == device:
        return features
    return features.to(device) if fits(features.nbytes, RESIDENT_BYTES, device) else features
