"""The pixels that trained weights expect.

Legend: C channels.
"""

from typing import NamedTuple

from torch import Tensor, nn


class Pretrained(NamedTuple):
    """A body with trained weights, and the normalisation of pixels that it was trained with.

    mean_C and std_C are in units of a pixel scaled to 0..1.
    """

    body: nn.Module
    mean_C: Tensor
    std_C: Tensor
