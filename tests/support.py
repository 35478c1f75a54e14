"""What several test folders share: the configuration of a small stream of digits."""

from typing import Any

from partialhn.config import Config

_SMALL: dict[str, dict[str, Any]] = {
    "data": {"data": "digits", "input_size": 16},
    "backbone": {"freeze_depth": 3, "trunk_epochs": 2, "trunk_batch_size": 32},
    "features": {"views": 1, "augment": "none"},
    "hypernet": {"fresh_columns": 4},
    "train": {"epochs": 3, "batch_size": 16, "detector_features": 16},
    "compute": {"threads": 1},
}


def small_config(**sections: dict[str, Any]) -> Config:
    """Digits of 16 x 16 pixels, freeze depth 3, few epochs, and the options of `sections`."""
    return Config.from_dict({name: values | sections.get(name, {})
                             for name, values in _SMALL.items()})
