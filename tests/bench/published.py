"""The published method as it is published, for comparison: what one of its training steps does.

Weights are generated for every sample and applied with vmap, the frozen trunk runs again on the
images of each batch; the regulariser takes a gradient of its own for a look-ahead of one step
(first order), copies the hypernetwork and generates every earlier task's weights twice (Hemati et
al. 2023). Written anew from that description, with its sizes: embedding 32, hidden 50 and 32,
channel embedding 32, beta 0.5.

Legend: B batch, C channels, H W spatial, D row length, E embedding, K classes.
"""

import copy

import torch
from torch import Tensor, nn

from partialhn.networks.backbone import build_network
from partialhn.networks.cut import CutNetwork
from partialhn.networks.head import Head

EMBEDDING, HIDDEN, CHANNEL = 32, (50, 32), 32
BETA, RATE = 0.5, 1e-3


class PublishedHypernet(nn.Module):
    """Embedding -> every weight of the head, classifier and normalisation included."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], tasks: int) -> None:
        super().__init__()
        self.shapes = shapes
        self.embeddings = nn.Embedding(tasks, EMBEDDING)
        self.mlp = nn.Sequential(nn.Linear(EMBEDDING, HIDDEN[0]), nn.ReLU(),
                                 nn.Linear(HIDDEN[0], HIDDEN[1]))
        self.channels = nn.ParameterList(torch.randn(shape[0], CHANNEL)
                                         for shape in shapes.values())
        self.rows = nn.ModuleList(nn.Linear(HIDDEN[1] + CHANNEL, torch.Size(shape[1:]).numel())
                                  for shape in shapes.values())

    def forward(self, task_B: Tensor) -> dict[str, Tensor]:
        """One set of weights for each entry of task_B."""
        x_BE = self.mlp(self.embeddings(task_B))
        weights = {}
        for (name, shape), v_CE, row in zip(self.shapes.items(), self.channels, self.rows,
                                            strict=True):
            z_BCE = torch.cat([x_BE[:, None].expand(-1, shape[0], -1),
                               v_CE.expand(len(task_B), -1, -1)], 2)
            weights[name] = row(z_BCE).view(len(task_B), *shape)
        return weights


class PublishedStep(nn.Module):
    """The loss of one step on a batch of images, after `earlier` other tasks."""

    def __init__(self, depth: int, earlier: int, classes: int) -> None:
        super().__init__()
        network = build_network("slim_resnet18", classes)
        cut = CutNetwork.of(network, depth)
        self.trunk = cut.trunk.eval()
        self.skeleton = Skeleton(Head(cut, "instance", 8), network.width, classes)
        shapes = {name: tuple(value.shape)
                  for name, value in self.skeleton.named_parameters()}
        self.hypernet = PublishedHypernet(shapes, earlier + 1)
        self.task = earlier
        self.kept = copy.deepcopy(self.hypernet)

    def forward(self, images_BCHW: Tensor, y_B: Tensor) -> Tensor:
        with torch.no_grad():
            z_BCHW = self.trunk(images_BCHW)
        weights = self.hypernet(torch.full((len(y_B),), self.task))
        logits_BK = torch.func.vmap(self._one)(weights, z_BCHW)
        loss = nn.functional.cross_entropy(logits_BK, y_B)
        return loss + BETA * self.regulariser(loss) if self.task else loss

    def _one(self, weights: dict[str, Tensor], z_CHW: Tensor) -> Tensor:
        return torch.func.functional_call(self.skeleton, weights, (z_CHW[None],))[0]

    def regulariser(self, loss: Tensor) -> Tensor:
        """Mean over the earlier tasks of the squared change of all their weights."""
        named = dict(self.hypernet.named_parameters())
        slopes = torch.autograd.grad(loss, list(named.values()), retain_graph=True)
        ahead = {name: value - RATE * slope
                 for (name, value), slope in zip(named.items(), slopes, strict=True)}
        before = copy.deepcopy(self.kept)
        total = torch.zeros(())
        for task in range(self.task):
            index_B = torch.tensor([task])
            with torch.no_grad():
                old = before(index_B)
            new = torch.func.functional_call(self.hypernet, ahead, (index_B,))
            for name in new:
                total = total + (new[name] - old[name]).square().sum()
        return total / self.task


class Skeleton(nn.Module):
    """The head as an ordinary module; its parameters only say which weights are needed."""

    def __init__(self, head: Head, width: int, classes: int) -> None:
        super().__init__()
        # with everything frozen the published head is a classifier alone
        self.stages = head.__dict__["_skeleton"] if head.matrices else nn.Identity()
        self.classifier = nn.Linear(width, classes, device="meta")

    def forward(self, z_BCHW: Tensor) -> Tensor:
        return self.classifier(self.stages(z_BCHW).mean((2, 3)))
