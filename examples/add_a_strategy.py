"""Your strategy: a head, averaged with the last one. Use: python examples/add_a_strategy.py."""

from typing import ClassVar, cast

import torch
from torch import nn

import partialhn as phn
from partialhn.strategies.shared_head import SharedHead


class Averaged(SharedHead):
    """Fine-tunes a shared head, then averages its weights over the tasks."""

    label = "Averaged head"
    options: ClassVar = {"share": 0.5}

    def begin(self, task: int) -> None:
        super().begin(task)
        self._before = [value.detach().clone() for value in self._shared()]

    @torch.no_grad()
    def finish(self, task: int) -> None:
        for value, before in zip(self._shared(), self._before if task else (), strict=False):
            value.lerp_(before, self.settings["share"])
        super().finish(task)

    def _shared(self) -> list[nn.Parameter]:
        return [*cast(list[nn.Parameter], list(self.convolutions)), self.norm]


if __name__ == "__main__":
    phn.register_strategy("averaged", Averaged)
    stream = phn.Stream("digits", tasks=5, input_size=16, trunk_epochs=4, epochs=4,
                        strategy="averaged", strategy_options=["share=0.3"], folder="averaged")
    stream.learn()
    print(stream.accuracy_matrix)
