"""YAML that a user wrote, read strictly: a key that stands twice in a table is an error.

PyYAML alone keeps the last of them, so a second section `train` would undo the first without a
word.
"""

from typing import Any

import yaml

from partialhn.errors import InputError


class _Loader(yaml.SafeLoader):
    """Builds plain values, as `yaml.safe_load` does, from tables whose keys differ."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} stands there twice",
                                           problem_mark=key.start_mark)
            seen.add((key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


def read_yaml(content: bytes, what: str) -> Any:
    """The plain values of a YAML file. what: names the file in messages.

    Raises: InputError for what is not YAML in UTF-8, or has a key twice.
    """
    try:
        return yaml.load(content.decode(), _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # ValueError: not UTF-8, or an impossible date
        raise InputError(f"{what} is not YAML: {error}") from error
