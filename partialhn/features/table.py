"""The table of number types that stored features may have; nothing here imports PyTorch.

Each line says where a `partialhn.features.codec.NumberType` is, as module:NAME, or is one. Other
packages add lines with `register_number_type` or with an entry point of the group
`partialhn.number_types`. Whoever reads such features needs the package too.
"""

from partialhn.plugins import Table

_HERE = "partialhn.features.codec"
NUMBER_TYPES: Table[object] = Table("feature_dtype", "partialhn.number_types", {
    "float32": f"{_HERE}:FLOAT32",
    "float16": f"{_HERE}:FLOAT16",
    "bfloat16": f"{_HERE}:BFLOAT16",
    "int8": f"{_HERE}:INT8",
}, lambda _name, value: value)
OWN = tuple(NUMBER_TYPES.own)
"""The number types of this package."""


def register_number_type(name: str, source: object) -> None:
    """Makes a number type of stored features known in this process under a name.

    Args:
        name: the name that `feature_dtype` takes.
        source: a `partialhn.features.codec.NumberType`, or where one is, as module:NAME.

    Other processes, as the workers of a cluster, do not see it: there the package must declare an
    entry point of the group `partialhn.number_types`.

    Raises: InputError for a name that is taken.
    """
    NUMBER_TYPES.register(name, source)
