"""Who needs which stored features: registered versions, logs of streams, and running jobs."""

import json

from partialhn.errors import InputError
from partialhn.features.manifest import FeatureRecipe
from pipelines.features.in_use import records
from pipelines.platform.storage import Storage
from pipelines.registry.client import Registry
from pipelines.retrain.journal import Journal
from pipelines.settings import mask_password

References = dict[str, list[str]]
"""By key of a set of features: who refers to it, in words."""


def references(storage: Storage, registry: Registry | None) -> References:
    """All that is known to need features; without a registry, versions are not known."""
    found: References = {}
    for name in registry.streams() if registry else ():
        for version in registry.versions(name) if registry else ():
            for key in json.loads(version.tags["feature_keys"]):
                found.setdefault(key, []).append(version.uri)
    for stream in storage.folders(storage.path("streams")):
        for decided in Journal(storage, stream).decided():
            for recipe in decided.recipes.values():
                found.setdefault(FeatureRecipe(**recipe).key, []).append(
                    f"stream {stream}, task {decided.slot}")
    for key, users in running(storage).items():
        found.setdefault(key, []).extend(users)
    return found


def running(storage: Storage) -> References:
    """What jobs that run now work with."""
    found: References = {}
    for _, use in records(storage):
        for key in () if use.prunes else use.keys:
            found.setdefault(key, []).append(str(use))
    return found


def check_registry(storage: Storage, registry: Registry | None) -> None:
    """Refuses a registry, or none, that does not know the streams whose history the storage keeps.

    Raises: InputError naming them: what their versions refer to could not be told.
    """
    known = set(registry.streams()) if registry else set()
    unknown = [name for name in storage.folders(storage.path("history")) if name not in known]
    if unknown:
        which = (f"the registry {mask_password(registry.tracking_uri)} does not know" if registry
                 else "no registry was asked about")
        raise InputError(f"{storage.uri} has the history of {', '.join(unknown)}, which {which}; "
                         "allowed: "
                         "the --tracking-uri that they were registered with, or, where their "
                         f"models are gone for good, to delete {storage.uri_of('history')}/<name>")
