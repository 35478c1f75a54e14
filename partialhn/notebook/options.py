"""The options of a `Stream`: configuration keys without their section, as on the command line."""

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from partialhn.config import ComputeConfig, Config, load_config
from partialhn.data.table import is_form
from partialhn.errors import InputError
from partialhn.presets import preset as preset_of

SECTIONS = {option.name: section.name for section in dataclasses.fields(Config)
            for option in dataclasses.fields(section.default_factory)}  # type: ignore[arg-type]
"""Option -> the section of `Config` that has it; every name is in one section only."""
SHARED_WORK = ("workers", "feature_workers", "ray_address")
"""Options that share the work among processes, which a stream in one process cannot."""
FREE = ("data.data", "data.image_column", "data.label_column", "features.compression",
        "train.compare")
"""Keys that do not change what is learned, and so may differ in the same folder. `compute` does
not either; the images are compared by their content."""


def configure(base: Config, options: Mapping[str, object]) -> Config:
    """The configuration with some options replaced.

    Raises: InputError for an unknown option, naming the nearest, or a value that is not allowed.
    """
    values = base.to_dict()
    if not isinstance(options.get("data", ""), str | Path):
        raise InputError(f"data is a {type(options['data']).__name__}; allowed: the path of a "
                         "folder or of Parquet files, or a data form such as digits. Images that "
                         "are in memory go into files first, as train/CLASS/NAME.png")
    for name, value in options.items():
        if name not in SECTIONS:
            near = difflib.get_close_matches(name, SECTIONS, 3, 0.5)
            raise InputError(f"unknown option {name}; "
                             + (f"the nearest: {', '.join(near)}" if near
                                else f"allowed: {', '.join(sorted(SECTIONS))}"))
        values[SECTIONS[name]][name] = _plain(value)
    config = Config.from_dict(values)
    for name in SHARED_WORK:
        value, default = getattr(config.compute, name), getattr(ComputeConfig(), name)
        if value != default:
            raise InputError(f"{name} is {value!r}; a Stream learns in this process, allowed: "
                             f"{default!r}, or share the work with `partialhn train`")
    return config


def _plain(value: object) -> object:
    """A value as YAML would have it: numbers and arrays of numpy and paths are none."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, Path):
        return str(value)
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


def base_config(config: Config | str | Path | None, preset: str | None) -> Config:
    """The configuration that options are laid over: given, in a YAML file, a preset, or defaults.

    Raises: InputError where two are given, or one that cannot be used.
    """
    if config is not None and preset is not None:
        raise InputError("config and preset are given; allowed: one of them")
    if preset is not None:
        return preset_of(preset)
    if config is None:
        return Config()
    return config if isinstance(config, Config) else load_config(config)


def absolute(config: Config) -> Config:
    """The configuration with a local data path made absolute, so that it holds in any folder."""
    data = config.data.data
    if is_form(data) or "://" in data:
        return config
    path = str(Path(data).expanduser().absolute())
    return dataclasses.replace(config, data=dataclasses.replace(config.data, data=path))


def differences(config: Config, stored: Mapping[str, Any]) -> list[str]:
    """The options that change what is learned and differ: `epochs is 5, stored is 4`."""
    found, stored = [], Config.from_dict(stored).to_dict()  # options newer than the folder too
    for section, values in config.to_dict().items():
        if section == "compute":
            continue
        for name, value in values.items():
            kept = stored.get(section, {}).get(name)
            if value != kept and f"{section}.{name}" not in FREE:
                found.append(f"{name} is {value!r}, in the folder it is {kept!r}")
    return found
