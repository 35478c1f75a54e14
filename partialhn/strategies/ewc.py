"""Elastic weight consolidation (Kirkpatrick et al. 2017), online (Schwarz et al. 2018).

A penalty holds each shared weight near its value after the last task, in proportion to how much
the earlier tasks need it: the diagonal of their Fisher information, summed over tasks. The method
stores two vectors, whatever the number of tasks.

Legend: P shared weights.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from partialhn.config import Config
from partialhn.features.feature_set import FeatureSet
from partialhn.networks.head import Head, HeadStart
from partialhn.strategies.shared_head import SharedHead

FISHER_IMAGES = 128
"""Number of images from which a task's Fisher information is estimated."""


class Ewc(SharedHead):
    """Cross-entropy + strength / 2 * sum of F_p (w_p - w*_p)^2 over the shared weights."""

    fisher_P: Tensor
    anchor_P: Tensor

    def __init__(self, head: Head, start: HeadStart, config: Config) -> None:
        super().__init__(head, start, config)
        self.strength = config.train.ewc_strength
        zeros_P = torch.zeros_like(self._flat())
        self.register_buffer("fisher_P", zeros_P)
        self.register_buffer("anchor_P", zeros_P.clone())

    def after_experience(self, task: int, features: FeatureSet, seed: Sequence[int]) -> None:
        """Adds the task's Fisher information: squared gradients of the log-likelihood, image by
        image, of labels drawn from the model's own answers.
        """
        self.eval()
        rng, shared = np.random.default_rng(list(seed)), self._shared()
        rows_n = rng.permutation(len(features))[:FISHER_IMAGES]
        for row in torch.split(torch.from_numpy(rows_n).to(features.y_N.device), 1):
            logits_1K = self(features.gather(row, torch.zeros_like(row)).to(self.norm.device), task)
            p_K = logits_1K.detach().softmax(1)[0].double().cpu().numpy()
            label = torch.tensor([rng.choice(len(p_K), p=p_K / p_K.sum())],
                                 device=logits_1K.device)
            gradients = torch.autograd.grad(nn.functional.cross_entropy(logits_1K, label), shared,
                                            allow_unused=True, materialize_grads=True)
            self.fisher_P += torch.cat([g.flatten() for g in gradients]).square() / len(rows_n)
        self.anchor_P.copy_(self._flat().detach())

    def regulariser(self, task: int) -> Tensor | None:
        if task == 0 or self.strength == 0:
            return None
        moved_P = self._flat() - self.anchor_P
        return self.strength / 2 * (self.fisher_P * moved_P.square()).sum()

    def _shared(self) -> list[Tensor]:
        return [*self.convolutions, self.norm]

    def _flat(self) -> Tensor:
        return torch.cat([value.flatten() for value in self._shared()])
