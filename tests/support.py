"""What several test folders share: the configuration of a small stream of digits."""

from pathlib import Path
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


SECRETS = {"AWS_ACCESS_KEY_ID": "AKIAHUSHHUSH00000042", "AWS_SECRET_ACCESS_KEY":
           "hush/Secret+Wd91kX0aBcDeFgHiJkLmNoPqRs", "AWS_SESSION_TOKEN": "HushToken77Zz==",
           "MLFLOW_TRACKING_PASSWORD": "HushPassword99"}
"""Credentials of nobody, for the environment of a run that must not write them down."""


def names_of_files_without_secrets(*folders: Path) -> set[str]:
    """Names of all files below the folders; fails where one of them holds a secret."""
    names = set()
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        assert not [key for key, secret in SECRETS.items() if secret.encode() in content], path
        names.add(path.name)
    return names
