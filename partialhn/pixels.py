"""Pixels as a network wants them: which part of an image becomes its square input, and how."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, cast, get_args

from partialhn.errors import InputError
from partialhn.numbers import percent

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Pixels:
    """The data configuration of trained weights.

    The defaults are those of trunks that are trained here and of the first backbones: the whole
    central square of the image, resized with antialiasing.
    """

    size: int | None = None
    """Side of the images that the weights were trained or tested with, in pixels; None: any."""
    interpolation: Interpolation = "bilinear"
    """Filter that resizes an image; all but nearest are antialiased."""
    crop: float = 1.0
    """Share of the shorter side that the central square keeps, above 0 and up to 1."""
    squash: bool = False
    """Whether the whole image becomes the square, with its sides' ratio changed; no crop then."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Mean of red, green and blue, subtracted from a pixel scaled to 0..1."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Spread of red, green and blue, which the difference is divided by. Mean and spread hold the
    value range too: 0.5 and 0.5 give values of -1 to 1, and 0 and 1/255 give 0 to 255."""

    def __post_init__(self) -> None:
        _require(self.size is None or self.size >= 1, "size", self.size, "1 or more pixels")
        _require(self.interpolation in get_args(Interpolation), "interpolation",
                 self.interpolation, ", ".join(get_args(Interpolation)))
        _require(0 < self.crop <= 1, "crop", self.crop, "above 0 and up to 1")
        _require(len(self.mean) == 3 and all(abs(value) < 256 for value in self.mean), "mean",
                 self.mean, "three numbers in units of a pixel scaled to 0..1")
        _require(len(self.std) == 3 and all(0 < value < 256 for value in self.std), "std",
                 self.std, "three numbers above 0 in units of a pixel scaled to 0..1")

    @property
    def value_range(self) -> tuple[float, float]:
        """Smallest and largest value that the network is given, over the three channels."""
        pairs = list(zip(self.mean, self.std, strict=True))
        return min(-m / s for m, s in pairs), max((1 - m) / s for m, s in pairs)

    @property
    def geometry(self) -> str:
        """A name for the way an image becomes a square; empty for that of the first backbones."""
        plain = Pixels()
        ours = (self.interpolation, self.crop, self.squash)
        return "" if ours == (plain.interpolation, plain.crop, plain.squash) else (
            f"{self.interpolation}/{'squash' if self.squash else self.crop}")

    def fields(self) -> dict[str, Any]:
        """Plain values that differ from the defaults, which `from_fields` reads."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)
                if getattr(self, field.name) != field.default}

    @staticmethod
    def from_fields(values: object) -> "Pixels":
        """Raises: InputError for values that `fields` does not give."""
        if not isinstance(values, Mapping):
            raise InputError(f"pixels is {values!r:.80}; allowed: a table")
        try:
            fields: dict[str, Any] = {key: tuple(value) if key in ("mean", "std") else value
                                      for key, value in values.items()}
            return Pixels(**fields)
        except TypeError as error:
            raise InputError(f"pixels is {dict(values)!r:.200}: {error}") from error

    def described(self) -> str:
        """One line about everything, for people."""
        part = ("the whole image squashed to a square" if self.squash else
                f"the central {percent(self.crop)} of the shorter side" if self.crop < 1 else
                "the whole central square")
        low, high = self.value_range
        return (f"{self.size or 'any number of'} pixels, {self.interpolation}, {part}, values "
                f"{low:.2f} to {high:.2f}")


def from_config(values: Mapping[str, Any], source: str) -> Pixels:
    """Pixels from a data configuration in timm's words (input_size, interpolation, crop_pct,
    crop_mode, mean, std); keys that are left out have timm's defaults.

    Raises: InputError naming the source and the value that cannot be used.
    """
    try:
        size = values.get("input_size") or (3, 224, 224)
        return Pixels(int(size[-1]), values.get("interpolation") or "bicubic",
                      float(values.get("crop_pct") or 0.875),
                      values.get("crop_mode") == "squash",
                      _three(values.get("mean") or IMAGENET_MEAN),
                      _three(values.get("std") or IMAGENET_STD))
    except (TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        raise InputError(f"the data configuration of {source} cannot be used: {error}") from error


def _three(values: Any) -> tuple[float, float, float]:
    return cast(tuple[float, float, float], tuple(float(value) for value in values))


def _require(holds: bool, key: str, value: object, allowed: str) -> None:
    if not holds:
        raise InputError(f"pixels.{key} is {value!r}; allowed: {allowed}")
