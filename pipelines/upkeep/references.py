"""References to stored features, from registered versions, logs of streams, and running jobs."""

from partialhn.errors import InputError
from partialhn.features.manifest import FeatureRecipe
from pipelines.features.in_use import records
from pipelines.platform.storage import Storage
from pipelines.registry.client import Registry
from pipelines.retrain.journal import Journal
from pipelines.settings import mask_password

References = dict[str, list[str]]
"""For each key of stored features, descriptions of those who need it."""


def references(storage: Storage, registry: Registry | None) -> References:
    """All references to features; without a registry those of versions are missing."""
    needed: References = {}
    for name in registry.streams() if registry else ():
        for version in registry.versions(name) if registry else ():
            for key in version.feature_keys:
                needed.setdefault(key, []).append(version.uri)
    for stream in storage.folders(storage.path("streams")):
        for decided in Journal(storage, stream).decided():
            for recipe in decided.recipes.values():
                needed.setdefault(FeatureRecipe(**recipe).key, []).append(
                    f"stream {stream}, task {decided.slot}")
    for key, users in running(storage).items():
        needed.setdefault(key, []).extend(users)
    return needed


def running(storage: Storage) -> References:
    """The references of jobs that run now."""
    used: References = {}
    for _, use in records(storage):
        for key in () if use.prunes else use.keys:
            used.setdefault(key, []).append(str(use))
    return used


def check_registry(storage: Storage, registry: Registry | None) -> None:
    """Checks that the registry has every stream whose history is in the storage.

    Raises: InputError naming the missing streams, because the references of their versions would
    be overlooked.
    """
    known = set(registry.streams()) if registry else set()
    unknown = [name for name in storage.folders(storage.path("history")) if name not in known]
    if unknown:
        why = (f"is not in the registry {mask_password(registry.tracking_uri)}" if registry
               else "needs a registry")
        raise InputError(f"{storage.uri} has the history of {', '.join(unknown)}, which {why}; "
                         "allowed: the --tracking-uri with which it was registered or, if its "
                         "models were deleted, to delete the folder "
                         f"{storage.uri_of('history')}/<name>")
