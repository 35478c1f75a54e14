"""What a stream has left behind, as text: tasks, versions, aliases, metrics, features."""

import json
from collections.abc import Sequence

from pipelines.platform.storage import open_storage
from pipelines.platform.text import table
from pipelines.registry.client import connect
from pipelines.registry.versions import CHAMPION, Version, challenger_of
from pipelines.settings import mask_password

_COLUMNS = ("task", "name", "classes", "version", "acc", "learned", "forgotten", "aliases")


def show(name: str, storage: str = "partialhn-store", tracking_uri: str | None = None) -> str:
    """A table of a stream's tasks as the champion has learned them.

    Accuracies are shares of the test images, of the model as it was after each task: `acc` is
    the mean over the tasks so far, `learned` the mean right after each was learned, `forgotten`
    the mean loss since.

    Raises: InputError for an unknown stream, listing the known ones.
    """
    registry = connect(open_storage(storage), tracking_uri, create=False)
    if registry.aliases.keeps_history(name):
        registry.aliases.reconcile(name)
    champion = registry.resolve(f"models:/{name}@{CHAMPION}")
    versions = registry.versions(name)
    current = chain_of(versions, champion)
    older = len(versions) - len(current)
    lines = [f"stream   {name}",
             f"model    models:/{name}@{CHAMPION} = version {champion.version} "
             f"({champion.task_index + 1} tasks)",
             f"mlflow   {mask_password(registry.tracking_uri)}",
             f"work     {champion.tags['work']}"
             + (f" ({older} versions of other work or weights are not shown)" if older else ""),
             *_refused(versions), "", *table([_COLUMNS, *map(_row, current)]), "",
             f"trunk {champion.tags['trunk_fingerprint']}", "features in"]
    return "\n".join(lines + [f"  {place}" for place in _feature_folders(current)])


def _refused(versions: Sequence[Version]) -> list[str]:
    """The challenger, and what the gate holds against it."""
    version = challenger_of(versions)
    if version is None:
        return []
    reasons = (version.decision or {}).get("reasons", [])
    return [f"refused  version {version.version} (task {version.task!r}) is challenger only:",
            *(f"         {reason}" for reason in reasons)]


def chain_of(versions: Sequence[Version], newest: Version) -> list[Version]:
    """The versions that one was learned from, task after task, and itself."""
    by_lineage_id = {version.tags.get("prefix", ""): version for version in versions}
    found = [newest]
    while parent := by_lineage_id.get(found[-1].tags.get("parent") or "none"):
        found.append(parent)
    return found[::-1]


def _row(version: Version) -> tuple[str, ...]:
    tags, classes = version.tags, json.loads(version.tags["classes"])
    listed = ", ".join(classes)
    return (tags["task_index"], version.task,
            listed if len(listed) <= 32 else f"{len(classes)}: {listed[:24]}...",
            str(version.version), *(f"{float(tags[key]):.3f}" for key in
                                    ("acc", "learning_accuracy", "forgetting")),
            ", ".join(version.aliases))


def _feature_folders(versions: Sequence[Version]) -> list[str]:
    """Each place once, in the order of the tasks."""
    return list(dict.fromkeys(f"{v.tags['storage']}/features/{key}" for v in versions
                              for key in json.loads(v.tags["feature_keys"])))
