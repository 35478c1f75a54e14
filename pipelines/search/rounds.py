"""The rounds of a search: the depths that its trials are divided among, one round after the other.

A search of given depths has one round. A search that refines begins with a coarse grid, which gets
its share of the budget. The next round has the depths in the middle between the best depth and its
neighbours, each with as many trials as every depth had so far, and so on until both neighbours of
the best depth have been tried. Then all depths that were tried go on, for as many trials as there
were; should another depth be the best by then, the depths around that one follow.

A round is stored before its first trial, so a resumed search goes on with the same ones.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from partialhn.errors import IntegrityError
from pipelines.search.space import Space
from pipelines.search.state import SearchState


@dataclasses.dataclass(frozen=True)
class Round:
    """Depths that share some trials of a search."""

    first: int
    """Number of its first trial."""
    depths: tuple[int, ...]
    trials: int | None = None
    """Number of its trials; None: as many as the budget gives it."""


class Rounds:
    """The rounds of a search so far.

    Args:
        space: the space of the search; its depths are the first round.
        later: the other rounds, in order.
    """

    def __init__(self, space: Space, later: Sequence[Round] = ()) -> None:
        self._space = space
        self.all = [Round(0, tuple(space.depths())), *later]

    @property
    def depths(self) -> list[int]:
        """The depths of all rounds, in order."""
        return sorted({depth for each in self.all for depth in each.depths})

    def point(self, number: int) -> tuple[dict[str, Any], bool]:
        """The grid point of a trial, and whether it is the first trial at this point."""
        index = max(at for at, each in enumerate(self.all) if each.first <= number)
        now, before = self.all[index], self.all[:index]
        points = self._space.grid_points(now.depths if before else None)
        place = number - now.first
        known = {depth for each in before for depth in each.depths}
        return points[place % len(points)], place < len(points) and not known & set(now.depths)

    def over(self, number: int, spent: float) -> bool:
        """Whether the last round is complete.

        number: of the next trial. spent: share of the budget for trials that is used.
        """
        now = self.all[-1]
        if not self._space.refines or now.trials is not None:
            return now.trials is not None and number >= now.first + now.trials
        points = len(self._space.grid_points())
        if number < points or number % points:
            return False
        return spent * (number + points) / number > self.coarse_share() + 1e-9

    def coarse_share(self) -> float:
        """The share of the budget that the coarse grid may use, if every depth gets the same.

        Halving the largest gap until it is one block adds at most two depths each time.
        """
        start, ends = self._space.depths(), self._space.possible_depths()
        places = [ends[0] - 1, *start, ends[-1] + 1]
        halvings = max((high - low - 1).bit_length() for low, high in itertools.pairwise(places))
        return len(start) / (len(start) + 2 * halvings)

    def following(self, number: int, best: int) -> Round:
        """The round that begins with trial `number`, after the last one. best: the best depth."""
        had = max(1, number // len(self._space.grid_points(self.depths)))
        depths = around(best, self.depths, self._space.possible_depths()[-1]) or self.depths
        return Round(number, tuple(depths), had * len(self._space.grid_points(depths)))


def around(best: int, tried: Sequence[int], deepest: int) -> list[int]:
    """The depths in the middle between the best one and its tried neighbours on both sides.

    Beyond the first and the last tried depth the network ends, at depth 0 and at `deepest`. Empty
    where both direct neighbours of the best depth were tried.
    """
    below = max((depth for depth in tried if depth < best), default=-1)
    above = min((depth for depth in tried if depth > best), default=deepest + 1)
    return ([(below + best + 1) // 2] * (best - below > 1)
            + [(best + above) // 2] * (above - best > 1))


def load_rounds(state: SearchState, space: Space) -> Rounds:
    """The rounds of a stored search. Raises: IntegrityError for damaged ones."""
    rounds = Rounds(space)
    while (fields := state.kept(_name(rounds))) is not None:
        rounds.all.append(_parse(_name(rounds), fields))
    return rounds


def add_round(state: SearchState, rounds: Rounds, number: int, best: int) -> None:
    """Stores the round that follows, and adds it."""
    new = rounds.following(number, best)
    fields = state.keep(_name(rounds), lambda: dataclasses.asdict(new))
    rounds.all.append(_parse(_name(rounds), fields))


def _name(rounds: Rounds) -> str:
    return f"round-{len(rounds.all)}"


def _parse(name: str, fields: dict[str, Any]) -> Round:
    try:
        return Round(int(fields["first"]), tuple(map(int, fields["depths"])),
                     int(fields["trials"]))
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"{name}.json cannot be read as a round of a search: "
                             f"{error!r}") from error
