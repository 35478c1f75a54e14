"""Named image corruptions for noisy streams: the same image always gives the same result.

The strengths are fixed, so that a name says everything. The published noisy stream is `none`,
`solarise`, `blur`, `grey+blur+autocontrast`.
"""

import hashlib
import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from partialhn.errors import InputError


def _solarise(image: Image.Image, _rng: np.random.Generator) -> Image.Image:
    """Inverts the values of 128 and above."""
    return ImageOps.solarize(image, threshold=128)


def _blur(image: Image.Image, _rng: np.random.Generator) -> Image.Image:
    """Gaussian blur with a standard deviation of 1/32 of the image's side."""
    return image.filter(ImageFilter.GaussianBlur(image.height / 32))


def _grey(image: Image.Image, _rng: np.random.Generator) -> Image.Image:
    """Luma (ITU-R 601) in all three channels."""
    return image.convert("L").convert("RGB")


def _autocontrast(image: Image.Image, _rng: np.random.Generator) -> Image.Image:
    """Stretches each channel to 0..255."""
    return ImageOps.autocontrast(image)


def _noise(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Adds Gaussian noise with a standard deviation of 25 of 255."""
    values_HWC = np.asarray(image, dtype=np.float32)
    noise_HWC = 25 * rng.standard_normal(values_HWC.shape, dtype=np.float32)
    return Image.fromarray((values_HWC + noise_HWC).round().clip(0, 255).astype(np.uint8))


def _jpeg(image: Image.Image, _rng: np.random.Generator) -> Image.Image:
    """Encodes as JPEG of quality 15 and decodes again."""
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=15)
    return Image.open(encoded, formats=("JPEG",)).convert("RGB")


CORRUPTIONS: dict[str, Callable[[Image.Image, np.random.Generator], Image.Image]] = {
    "solarise": _solarise,
    "blur": _blur,
    "grey": _grey,
    "autocontrast": _autocontrast,
    "noise": _noise,
    "jpeg": _jpeg,
}


def parse(transform: str) -> tuple[str, ...]:
    """The corruptions of a transform, in the order they are applied; `none` has none.

    Raises: InputError for an unknown name.
    """
    names = () if transform == "none" else tuple(transform.split("+"))
    for name in names:
        if name not in CORRUPTIONS:
            raise InputError(f"image transform {transform!r} has the unknown part {name!r}; "
                             f"allowed: none, or {', '.join(CORRUPTIONS)}, several joined by +")
    return names


def corrupt(image: Image.Image, names: tuple[str, ...], key: bytes, seed: int) -> Image.Image:
    """Applies corruptions to an RGB image.

    Args:
        image: of mode RGB.
        names: from `parse`.
        key: identifies the image; what is random is drawn from it and the seed.
        seed: another one gives other noise.
    """
    for step, name in enumerate(names):
        digest = hashlib.sha256(f"{seed}:{step}:{name}:".encode() + key).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        image = CORRUPTIONS[name](image, rng)
    return image
