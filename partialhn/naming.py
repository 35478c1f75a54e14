"""Names of stored results: hashes of everything that determines them.

A configuration option that is newer than version 0.1.0 does not change a name while it has the
default that it was introduced with: what was learned before the option existed is found again.
"""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

FIRST_OPTIONS: Mapping[str, frozenset[str]] = {section: frozenset(names.split()) for
                                               section, names in {
    "data": "data stream tasks task_sizes classes images_per_class input_size validation test "
            "task_transforms on_bad_image max_image_pixels class_order stream_seed",
    "backbone": "backbone freeze_depth trunk trunk_epochs trunk_batch_size trunk_learning_rate "
                "trunk_precision trunk_seed",
    "features": "views augment feature_dtype compression shard_rows",
    "hypernet": "generator starts_from fresh_columns code_dim embedding_dim hidden channel_dim "
                "residual norm norm_groups beta",
    "train": "strategy compare epochs batch_size learning_rate schedule precision "
             "label_smoothing seed buffer ewc_strength lwf_strength",
    "compute": "workers share device feature_workers threads cuda_graphs ray_address cache "
               "cache_gib"}.items()}
"""The options of version 0.1.0 by section: their values are part of every name. The list is
closed; an option that is added later must not be added here."""
FIRST_DEFAULT = "first_default"
"""Metadata of a newer option whose default was changed: the default it was introduced with.
Without it, two different values would share the name that leaves the option out."""


def digest_text(text: str, length: int = 64) -> str:
    """The first `length` hexadecimal digits of a text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def digest(values: Any, length: int = 64) -> str:
    """The digest of plain values: of their JSON with sorted keys."""
    return digest_text(json.dumps(values, sort_keys=True), length)


def named_values(options: Any, first: Collection[str]) -> dict[str, Any]:
    """The fields of an options dataclass that belong into a name.

    first: fields that always do. A newer field does only when its value is not its first default.
    """
    return {field.name: getattr(options, field.name) for field in dataclasses.fields(options)
            if field.name in first or getattr(options, field.name) != _first_default(field)}


def named_sections(config: Any) -> dict[str, dict[str, Any]]:
    """`named_values` of every section of a configuration; a newer section that adds nothing is
    left out. Values are plain: tuples become lists.
    """
    sections = {field.name: named_values(getattr(config, field.name),
                                         FIRST_OPTIONS.get(field.name, ()))
                for field in dataclasses.fields(config)}
    plain: dict[str, dict[str, Any]] = json.loads(json.dumps(sections))
    return {section: values for section, values in plain.items() if values}


def _first_default(field: dataclasses.Field[Any]) -> Any:
    if FIRST_DEFAULT in field.metadata:
        return field.metadata[FIRST_DEFAULT]
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default
