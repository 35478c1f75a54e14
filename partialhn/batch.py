"""What passes between the feature store and the training loop.

Legend: B batch, C channels, H W spatial.
"""

from typing import NamedTuple

from torch import Tensor


class FeatureBatch(NamedTuple):
    """Frozen-trunk features of one batch, all of one task.

    z_BCHW: float32 features. y_B: int64 labels, 0 to K-1 within the task. share: the factor that
    makes the mean over workers of their local means the mean over the global batch; 1 when every
    worker holds equally many rows. seed: of whatever is drawn at this step, the same for every
    worker.
    """

    z_BCHW: Tensor
    y_B: Tensor
    share: float
    seed: tuple[int, ...]
