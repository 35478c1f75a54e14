"""A linear probe: the accuracy of a linear classifier on the frozen trunk's features.

It is ridge regression on one-hot labels, in closed form (`partialhn.features.closed_form`), on
features pooled to a few cells. A task whose head is less accurate than a probe has learned nothing
above the trunk. The gate of retraining uses it.

Legend: N images, C channels, H W spatial, F pooled features.
"""

from torch import Tensor

from partialhn.features.closed_form import accuracy, fit_ridge, pooled_cells
from partialhn.features.feature_set import FeatureSet

MAX_FEATURES = 1024
"""Most pooled features of an image, so that the closed form stays fast."""


def linear_probe(train: FeatureSet, test: FeatureSet, classes: int) -> float:
    """Accuracy, 0 to 1, on the test features. The same features give the same number."""
    classifier = fit_ridge(pooled(train), train.y_N.cpu(), classes)
    return accuracy(classifier.logits(pooled(test)), test.y_N.cpu())


def ridge_accuracy(train: FeatureSet, test: FeatureSet, classes: int) -> float:
    """Accuracy, 0 to 1, of the strategy `ridge`: features are pooled over the whole image."""
    classifier = fit_ridge(pooled_cells(train, 1), train.y_N.cpu(), classes)
    return accuracy(classifier.logits(pooled_cells(test, 1).double()), test.y_N.cpu())


def pooled(features: FeatureSet) -> Tensor:
    """(N, F) float64 of the first, plain view: averages of as many cells as `MAX_FEATURES`
    allows.
    """
    channels, height, width = features.manifest.shape_VCHW[1:]
    side = next((s for s in range(min(height, width, 32), 0, -1)
                 if channels * s * s <= MAX_FEATURES), 1)
    return pooled_cells(features, side).double()
