"""The outcome of one pass of `partialhn retrain`, as text for people and as JSON."""

import dataclasses
from typing import Any

GATED = 3
"""Exit code of a pass in which the gate stopped a task."""


@dataclasses.dataclass
class PassOutcome:
    """The outcome of one pass so far."""

    stream: str
    dry_run: bool = False
    held_by: str = ""
    """The other process that holds the stream's lease; empty if there is none."""
    repaired: list[str] = dataclasses.field(default_factory=list)
    """Work that this pass completed for an earlier one that was interrupted."""
    rejected: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    waiting: list[str] = dataclasses.field(default_factory=list)
    """Folders of the inbox that are not ready yet."""
    skipped: list[str] = dataclasses.field(default_factory=list)
    """Arrivals on which an earlier pass decided, unchanged since then."""
    not_used: list[str] = dataclasses.field(default_factory=list)
    """Folders of learned tasks whose files are not those that were learned."""
    forgotten: list[str] = dataclasses.field(default_factory=list)
    """Arrivals of tasks that the champion has forgotten, with what to do."""
    adopted: list[str] = dataclasses.field(default_factory=list)
    """Tasks that `partialhn train` learned, and that entered the log in this pass."""
    learned: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Every task that was learned, with the gate's decision."""
    would: list[str] = dataclasses.field(default_factory=list)
    """In a dry run, the actions that a real pass would take."""
    notes: list[str] = dataclasses.field(default_factory=list)
    """What the user should know about this pass; each was printed while it ran."""
    images_decoded: int = 0
    """Images decoded for the features of this pass."""
    error: str = ""
    """The error that ended the pass before its end."""
    champion: int | None = None
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    """Wall seconds by phase."""

    @property
    def stopped(self) -> list[dict[str, Any]]:
        """The learned tasks that the gate stopped."""
        return [task for task in self.learned if not task["decision"]["passed"]]

    @property
    def exit_code(self) -> int:
        return GATED if self.stopped else 0

    @property
    def did_nothing(self) -> bool:
        return not (self.held_by or self.repaired or self.rejected or self.adopted
                    or self.learned or self.would or self.error)

    @property
    def _forgot_is_champion(self) -> bool:
        """Whether the line about a forgotten task says which version is champion."""
        return any("forgotten" in task and task["decision"]["passed"]
                   and task["version"] == self.champion for task in self.learned)

    def fields(self) -> dict[str, Any]:
        """Plain values for --json."""
        return dataclasses.asdict(self) | {"exit_code": self.exit_code,
                                           "nothing_to_do": self.did_nothing}

    def lines(self) -> list[str]:
        """The summary that is printed at the end of a pass."""
        if self.held_by:
            return [f"{self.stream}: skipped, because another process is working on the stream: "
                    f"{self.held_by}"]
        lines = [f"repaired: {text}" for text in self.repaired]
        lines += [f"taken over from `partialhn train`: task {text!r}" for text in self.adopted]
        for rejection in self.rejected:
            lines.append(f"rejected {rejection['task']}: " + "; ".join(rejection["reasons"]))
        lines += [f"waiting: {text}" for text in self.waiting]
        lines += [f"not used: {text}" for text in self.not_used]
        lines += [f"not learned: {text}" for text in self.forgotten]
        lines += [f"skipped, unchanged since the last decision: {text}" for text in self.skipped]
        for task in self.learned:
            lines += _learned_lines(task)
        lines += [f"would: {text}" for text in self.would]
        if self.did_nothing:
            lines.append(f"{self.stream}: nothing to do")
        elif self.champion is not None and not self._forgot_is_champion:
            lines.append(f"champion: models:/{self.stream}/{self.champion}")
        return lines


def _learned_lines(task: dict[str, Any]) -> list[str]:
    decision = task["decision"]
    uri = f"models:/{task['stream']}/{task['version']}"
    warnings = [f"WARNING task {decision['task']!r}: {text}"
                for text in decision.get("warnings", ())]
    if "forgotten" in task:
        place = "is champion" if decision["passed"] else "stays challenger"
        return [f"forgot {task['forgotten']}: {uri} {place}", *warnings,
                *(f"  stays: {text}" for text in task["stays"]),
                *(f"  {reason}" for reason in decision["reasons"])]
    if decision["passed"]:
        return [f"learned {task['slot']}: {uri} is champion", *warnings]
    lines = [f"stopped {task['slot']}: {uri} stays challenger", *warnings]
    lines += [f"  {reason}" for reason in decision["reasons"]]
    suffering = [row["task"] for row in decision["tasks"]
                 if not row["passed"] and row["loss"] is not None]
    return lines + ([f"  tasks that would lose too much: {', '.join(suffering)}"]
                    if suffering else [])
