"""A stream as text: its tasks, versions, aliases, metrics and features."""

import json
from collections.abc import Sequence

from partialhn.data.experience import task_of
from pipelines.platform.storage import open_storage
from pipelines.platform.text import MEANS, table
from pipelines.registry.client import Registry, connect
from pipelines.registry.versions import CHAMPION, Version, chain_of, challenger_of
from pipelines.settings import mask_password

_COLUMNS = ("task", "name", "classes", "version", "accuracy",
            "when learned", "forgotten", "aliases")


def show(name: str, storage: str = "partialhn-store", tracking_uri: str | None = None) -> str:
    """A table of the champion's tasks, one row for each, with the number that `--task` takes.

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
    others, slots = len(versions) - len(current), _slots(registry, current)
    tasks = champion.task_index + 1 if slots is None else len({*map(task_of, slots)})
    lines = [*(f"warning: {text}" for text in warnings), f"stream   {name}",
             f"model    models:/{name}@{CHAMPION} = version {champion.version} "
             f"({tasks} tasks)",
             f"mlflow   {mask_password(registry.tracking_uri)}",
             f"inputs   {champion.tags['work']} (a name for its options and data)"
             + (f"; versions that the champion does not rest on, not shown: {others}" if others
                else ""),
             *(f"forgotten {text}" for text in map(str, champion.forgotten)),
             *_refused(versions), "", *_tasks(current, slots), "",
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


def _slots(registry: Registry, current: Sequence[Version]) -> list[str] | None:
    """Names of the champion's slots, oldest first; None where its files, which must say them if
    versions were deleted, cannot be read.
    """
    champion = current[-1]
    if champion.task_index < len(current):
        return [version.task for version in current]
    return registry.slots_of(champion)


def _tasks(current: Sequence[Version], slots: Sequence[str] | None) -> list[str]:
    """The table of the tasks, whose last version is the champion, and what must be said of it.

    A task has the number that `predict --task` takes, and a refreshed task is listed once, with the
    version of its newest slot. slots: as `_slots` gives them.
    """
    newest = {task_of(version.task): version for version in current}
    tasks = dict.fromkeys(map(task_of, slots or ()))
    numbers = {task: str(number) for number, task in enumerate(tasks)}
    rows = [_row(numbers.get(task, ""), version) for task, version in newest.items()]
    missing = (len(numbers) - len(newest) if slots is not None
               else max(0, current[-1].task_index + 1 - len(current)))
    absent = [f"{missing} more of the champion's tasks are not listed, because their versions were "
              "deleted; it answers them as before"] if missing else []
    if slots is None:
        absent.append("the tasks have no numbers here, because the champion's files cannot be read")
    return [*table([_COLUMNS, *sorted(rows, key=lambda row: int(row[0] or 0))]), MEANS, *absent]


def _row(number: str, version: Version) -> tuple[str, ...]:
    """The row of a version; `number` is its task's among those that the champion knows."""
    tags, classes = version.tags, json.loads(version.tags["classes"])
    listed = ", ".join(classes)
    return (number, version.task,
            listed if len(listed) <= 32 else f"{len(classes)}: {listed[:24]}...",
            str(version.version), *(f"{float(tags[key]):.3f}" for key in
                                    ("acc", "learning_accuracy", "forgetting")),
            ", ".join(version.aliases))


def _feature_folders(versions: Sequence[Version]) -> list[str]:
    """The folders of the versions' features, each once, in the order of the tasks."""
    return list(dict.fromkeys(f"{v.tags['storage']}/features/{key}" for v in versions
                              for key in json.loads(v.tags["feature_keys"])))
