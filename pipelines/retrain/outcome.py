"""What one pass of `partialhn retrain` found and did, for people and for machines."""

import dataclasses
from typing import Any

GATED = 3
"""Exit code of a pass in which the gate stopped something."""


@dataclasses.dataclass
class Pass:
    """One pass, as far as it has come."""

    stream: str
    dry_run: bool = False
    held_by: str = ""
    """Who holds the stream's lease, where that is another process."""
    repaired: list[str] = dataclasses.field(default_factory=list)
    """What an earlier pass, cut short, had left to do."""
    rejected: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    waiting: list[str] = dataclasses.field(default_factory=list)
    """Folders of the inbox that are not ready."""
    skipped: list[str] = dataclasses.field(default_factory=list)
    """Arrivals that were decided before and have not changed."""
    learned: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Every task that was learned, with the gate's decision."""
    would: list[str] = dataclasses.field(default_factory=list)
    """What a dry run would have done."""
    champion: int | None = None
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    """Wall seconds by stage."""

    @property
    def stopped(self) -> list[dict[str, Any]]:
        """Tasks that the gate let not pass."""
        return [each for each in self.learned if not each["decision"]["passed"]]

    @property
    def exit_code(self) -> int:
        return GATED if self.stopped else 0

    @property
    def did_nothing(self) -> bool:
        return not (self.held_by or self.repaired or self.rejected or self.learned or self.would)

    def fields(self) -> dict[str, Any]:
        """Plain values for --json."""
        return dataclasses.asdict(self) | {"exit_code": self.exit_code,
                                           "nothing_to_do": self.did_nothing}

    def lines(self) -> list[str]:
        """What a person reads at the end of a pass."""
        if self.held_by:
            return [f"{self.stream}: nothing done; the lease is held by {self.held_by}"]
        lines = [f"repaired: {text}" for text in self.repaired]
        for each in self.rejected:
            lines.append(f"rejected {each['task']}: " + "; ".join(each["reasons"]))
        lines += [f"waiting: {text}" for text in self.waiting]
        lines += [f"decided before, not changed since: {text}" for text in self.skipped]
        for each in self.learned:
            lines += _learned_lines(each)
        lines += [f"would: {text}" for text in self.would]
        if self.did_nothing:
            lines.append(f"{self.stream}: nothing to do")
        elif self.champion is not None:
            lines.append(f"champion: models:/{self.stream}/{self.champion}")
        return lines


def _learned_lines(each: dict[str, Any]) -> list[str]:
    decision = each["decision"]
    if decision["passed"]:
        return [f"learned {each['slot']}: models:/{each['stream']}/{each['version']} is champion"]
    lines = [f"stopped {each['slot']}: models:/{each['stream']}/{each['version']} stays challenger"]
    lines += [f"  {reason}" for reason in decision["reasons"]]
    suffering = [row["task"] for row in decision["tasks"]
                 if not row["passed"] and row["loss"] is not None]
    return lines + ([f"  would have suffered: {', '.join(suffering)}"] if suffering else [])
