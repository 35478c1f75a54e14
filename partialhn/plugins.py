"""Tables of what an option may name, and how other packages add lines to them.

A table has the package's own lines, the lines that a program registered in its process, and the
lines that installed packages declare as entry points of the table's group. Reading the names loads
no code of another package: an object is imported when it is used for the first time.
"""

import importlib
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar

from partialhn.errors import InputError

Line = TypeVar("Line")


class Table(Mapping[str, Line], Generic[Line]):
    """Lines by name, the package's own first.

    Args:
        option: the configuration key that names a line, for messages.
        group: the entry-point group that adds lines.
        own: the package's own lines.
        from_entry_point: makes a line of an entry point's name and value (`module:attribute`).
    """

    def __init__(self, option: str, group: str, own: Mapping[str, Line],
                 from_entry_point: Callable[[str, str], Line]) -> None:
        self.option, self.group, self.own = option, group, dict(own)
        self._from_entry_point = from_entry_point
        self._lines = dict(own)
        self._origins = dict.fromkeys(own, "partialhn")
        self._discovered = False

    def register(self, name: str, line: Line, origin: str = "this program") -> None:
        """Adds a line. Raises: InputError for a name that is taken, or that no option can hold."""
        if not name.replace("-", "_").isidentifier():
            raise InputError(f"{self.option} is registered as {name!r}; allowed: letters, digits, "
                             "- and _, not starting with a digit")
        if name in self._lines and self._lines[name] != line:
            raise InputError(f"{self.option} {name!r} is defined by {self._origins[name]} and by "
                             f"{origin}; allowed: names that nobody else has, so rename one of "
                             "them or uninstall one of the packages")
        self._lines[name] = line
        self._origins.setdefault(name, origin)

    def unregister(self, name: str) -> None:
        """Removes a line that `register` added."""
        del self._lines[name], self._origins[name]

    def find(self, name: str) -> Line:
        """The line of a name. Raises: InputError that lists the names there are."""
        try:
            return self[name]
        except KeyError:
            raise InputError(f"{self.option} is {name!r}; allowed: {self.allowed()}") from None

    patterns: tuple[str, ...] = ()
    """Forms of further names that a table of some kind finds, such as timm:NAME."""

    def allowed(self) -> str:
        """The names that an option may have, for messages."""
        return ", ".join((*self, *self.patterns))

    def __getitem__(self, name: str) -> Line:
        if name not in self._lines:
            self._discover()
        return self._lines[name]

    def __iter__(self) -> Iterator[str]:
        self._discover()
        return iter(tuple(self._lines))

    def __len__(self) -> int:
        self._discover()
        return len(self._lines)

    def _discover(self) -> None:
        """Registers the entry points of the group, once a process."""
        if self._discovered:
            return
        self._discovered = True
        for point in importlib.metadata.entry_points(group=self.group):
            package = point.dist.name if point.dist else point.value
            self.register(point.name, self._from_entry_point(point.name, point.value),
                          f"the package {package}")


def load_object(at: str, what: str) -> object:
    """The object at `module:attribute`; `what` names it in messages, as in "strategy 'naive'".

    Raises: InputError where the module cannot be imported or lacks the attribute.
    """
    module, colon, attribute = at.partition(":")
    if not (module and colon and attribute):
        raise InputError(f"{what} is at {at!r}; allowed: module:attribute")
    try:
        found = importlib.import_module(module)
    except Exception as error:  # whatever another package raises while it is imported
        raise InputError(f"{what} cannot be imported from {at!r}: {type(error).__name__}: {error}"
                         ) from error
    try:
        return getattr(found, attribute)
    except AttributeError as error:
        raise InputError(f"{what} cannot be imported from {at!r}: {module} has no {attribute}"
                         ) from error
