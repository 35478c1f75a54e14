"""A stream as text: its tasks, versions, aliases, metrics and features."""

import json
from collections.abc import Sequence

from pipelines.platform.storage import open_storage
from pipelines.platform.text import MEANS, table
from pipelines.registry.client import connect
from pipelines.registry.versions import CHAMPION, Version, chain_of, challenger_of
from pipelines.settings import mask_password

_COLUMNS = ("task", "name", "classes", "version", "accuracy",
            "when learned", "forgotten", "aliases")


def show(name: str, storage: str = "partialhn-store", tracking_uri: str | None = None) -> str:
    """A table of the champion's tasks, one row for each.

    Accuracies are shares of the test images, for the model after each task: `accuracy` is the mean
    over the tasks so far, `when learned` the mean directly after each task was learned, `forgotten`
    the mean loss since then.

    Raises: InputError for an unknown stream, listing the known ones.
    """
    registry = connect(open_storage(storage), tracking_uri, create=False)
    warnings = (registry.aliases.differences(name) if registry.aliases.keeps_history(name) else [])
    champion = registry.resolve(f"models:/{name}@{CHAMPION}")
    versions = registry.versions(name)
    current = chain_of(versions, champion)
    others = len(versions) - len(current)
    lines = [*(f"warning: {text}" for text in warnings), f"stream   {name}",
             f"model    models:/{name}@{CHAMPION} = version {champion.version} "
             f"({champion.task_index + 1} tasks)",
             f"mlflow   {mask_password(registry.tracking_uri)}",
             f"inputs   {champion.tags['work']} (a name for its options and data)"
             + (f"; versions that the champion does not rest on, not shown: {others}" if others
                else ""),
             *(f"forgotten {text}" for text in map(str, champion.forgotten)),
             *_refused(versions), "", *_tasks(current), "",
             f"trunk {champion.tags['trunk_fingerprint']}", "features in"]
    return "\n".join(lines + [f"  {folder}" for folder in _feature_folders(current)])


def _refused(versions: Sequence[Version]) -> list[str]:
    """The challenger, with the reasons for which the gate refused it."""
    version = challenger_of(versions)
    if version is None:
        return []
    reasons = (version.decision or {}).get("reasons", [])
    return [f"refused  version {version.version} (task {version.task!r}) is challenger only:",
            *(f"         {reason}" for reason in reasons)]


def _tasks(current: Sequence[Version]) -> list[str]:
    """The table of the tasks, whose last version is the champion, and what must be said of it."""
    missing = max(0, current[-1].task_index + 1 - len(current))
    rows = [_row(version.task_index if missing else index, version)
            for index, version in enumerate(current)]
    absent = [f"{missing} more of the champion's tasks are not listed, because their versions were "
              "deleted; it answers them as before"] if missing else []
    return [*table([_COLUMNS, *rows]), MEANS, *absent]


def _row(index: int, version: Version) -> tuple[str, ...]:
    """The row of a version; `index` is its task's place among those that the champion knows."""
    tags, classes = version.tags, json.loads(version.tags["classes"])
    listed = ", ".join(classes)
    return (str(index), version.task,
            listed if len(listed) <= 32 else f"{len(classes)}: {listed[:24]}...",
            str(version.version), *(f"{float(tags[key]):.3f}" for key in
                                    ("acc", "learning_accuracy", "forgetting")),
            ", ".join(version.aliases))


def _feature_folders(versions: Sequence[Version]) -> list[str]:
    """The folders of the versions' features, each once, in the order of the tasks."""
    return list(dict.fromkeys(f"{v.tags['storage']}/features/{key}" for v in versions
                              for key in json.loads(v.tags["feature_keys"])))
