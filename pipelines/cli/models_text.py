"""The text that `partialhn models` prints for the dicts of `pipelines.registry.models`."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.platform.text import MEANS, table

LABELS = {"acc": "accuracy", "learning_accuracy": "when learned", "forgetting": "forgotten",
          "work": "options and data"}
"""Words for the keys of a version whose own name says little."""


def versions_text(found: Mapping[str, Any]) -> str:
    """A table of versions, and below it the reasons for which the gate refused some."""
    rows = [("version", "task", "accuracy", "when learned", "forgotten", "gate", "aliases")]
    for row in found["versions"]:
        rows.append((str(row["version"]), row["task"], f"{row['acc']:.3f}",
                     f"{row['learning_accuracy']:.3f}", f"{row['forgetting']:.3f}",
                     row["gate"] or "no gate", ", ".join(row["aliases"])))
    refused = [f"version {row['version']} was refused: {reason}"
               for row in found["versions"] for reason in row["reasons"]]
    return "\n".join([*_warnings(found), *table(rows), MEANS, *refused])


def version_text(found: Mapping[str, Any]) -> str:
    """The facts about one version, the gate's decision, and its alias moves."""
    lines = _warnings(found)
    for key in ("uri", "task", "task_index", "aliases", "acc", "learning_accuracy", "forgetting",
                "classes", "work", "weights_hash", "trunk_fingerprint", "storage", "run_id"):
        value = found[key]
        shown = ", ".join(value) if isinstance(value, list) else (
            f"{value:.3f}" if isinstance(value, float) else str(value))
        lines.append(f"{LABELS.get(key, key).replace('_', ' '):<18} {shown}")
    lines += [f"{'forgotten':<18} {text}" for text in found["forgotten"]]
    return "\n".join([*lines, "", *decision_lines(found["decision"]), "",
                      *_move_lines(found["history"])])


def history_text(found: Mapping[str, Any]) -> str:
    """A table with one alias move in each row."""
    return "\n".join([*_warnings(found), f"history {found['where']}",
                      *_move_lines(found["entries"])])


def moved_text(found: Mapping[str, Any]) -> str:
    """The result of a promotion or a rollback."""
    champion = (f"{found['stream']}: champion is version {found['champion']} "
                f"(task {found['task']!r})")
    entry = found["entry"]
    move = "the alias already pointed there; nothing was moved" if entry is None else (
        f"history entry {entry['seq']}: {entry['kind']} {_arrow(entry)}")
    changes = [f"it {verb} these tasks, and version {found['before']} {other}: {', '.join(tasks)}"
               for verb, other, tasks in (("does not know", "does", found["tasks_lost"]),
                                          ("knows", "does not", found["tasks_gained"])) if tasks]
    return "\n".join([*found["repaired"], champion, *changes, move])


def repaired_text(found: Mapping[str, Any]) -> str:
    """The result of a repair."""
    return "\n".join([*found["repaired"],
                      f"{found['stream']} version {found['version']}: files as registered"])


def _warnings(found: Mapping[str, Any]) -> list[str]:
    return [f"warning: {text}" for text in found["warnings"]]


def decision_lines(decision: Mapping[str, Any] | None) -> list[str]:
    """The gate's decision: every limit with the value found, and every task's accuracy."""
    if decision is None:
        return ["gate: none (the version was registered without a gate)"]
    rows = [("task", "before", "after", "loss", "")]
    for row in decision["tasks"]:
        new = row["before"] is None
        rows.append((row["task"], "new" if new else f"{row['before']:.3f}", f"{row['after']:.3f}",
                     "" if new else f"{row['loss']:.3f}",
                     "" if row["passed"] else "loses too much"))
    refused = set(decision["reasons"])
    return [f"gate: {'passed' if decision['passed'] else 'failed'}",
            *(f"  {'failed' if check in refused else 'ok    '} {check}"
              for check in decision["checks"]), *table(rows)]


def _move_lines(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [("#", "time", "who", "kind", "alias", "move", "accuracy", "why")]
    for entry in entries:
        acc = entry["metrics"].get("acc")
        rows.append((str(entry["seq"]), entry["time"], entry["who"], entry["kind"], entry["alias"],
                     _arrow(entry), "" if acc is None else f"{acc:.3f}", entry["why"]))
    return table(rows) if entries else ["no alias was moved"]


def _arrow(entry: Mapping[str, Any]) -> str:
    return " -> ".join("none" if entry[key] is None else str(entry[key]) for key in ("from", "to"))
