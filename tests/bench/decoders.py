"""The pixels and the time of other image decoders beside Pillow's, by format.

    python tests/bench/decoders.py [--images 16]

It needs torchvision, and TorchCodec for its columns (`pip install torchcodec`), which the product
does not need. Images are 500 x 375, in memory; one thread.
"""

import argparse
import importlib
import io
import statistics
import time
import warnings

import numpy as np
import torch
from PIL import Image

from partialhn.data.decode import decode_images

FORMATS = {
    "JPEG 4:2:0": ("JPEG", "RGB", {"quality": 85}),
    "JPEG 4:4:4": ("JPEG", "RGB", {"quality": 85, "subsampling": 0}),
    "JPEG progressive": ("JPEG", "RGB", {"quality": 85, "progressive": True}),
    "JPEG grey": ("JPEG", "L", {"quality": 85}), "JPEG CMYK": ("JPEG", "CMYK", {"quality": 85}),
    "JPEG turned by EXIF": ("JPEG", "RGB", {"quality": 85, "exif": {0x112: 6}}),
    "PNG": ("PNG", "RGB", {}), "PNG with alpha": ("PNG", "RGBA", {}),
    "PNG palette": ("PNG", "P", {}), "PNG 16 bits": ("PNG", "I;16", {}),
    "GIF": ("GIF", "P", {}), "WebP": ("WEBP", "RGB", {"quality": 85}),
    "WebP lossless": ("WEBP", "RGB", {"lossless": True}), "BMP": ("BMP", "RGB", {}),
    "TIFF": ("TIFF", "RGB", {}), "PPM": ("PPM", "RGB", {})}


def encoded(count: int, name: str, mode: str, options: dict) -> list[bytes]:
    """Images of a format: smooth with noise, as photographs are."""
    rng, images = np.random.default_rng(0), []
    options = dict(options)
    if "exif" in options:
        exif = Image.Exif()
        exif.update(options["exif"])
        options["exif"] = exif
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)).astype(int)
        image = Image.fromarray((smooth + rng.integers(-12, 12, smooth.shape)).clip(0, 255)
                                .astype(np.uint8))
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        elif mode == "RGBA":
            image.putalpha(image.convert("L"))
        else:
            image = image.convert(mode)
        buffer = io.BytesIO()
        image.save(buffer, name, **options)
        images.append(buffer.getvalue())
    return images


def pillow(content: bytes) -> np.ndarray:
    """RGB of the whole image, as `partialhn.data.decode` has it before resizing."""
    with Image.open(io.BytesIO(content)) as image:
        if image.mode.startswith("I;16"):
            return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, 2)
        return np.asarray(image.convert("RGB"))


def other(library: str):
    """The decoder of a library to RGB; None where it is not installed."""
    try:
        module = importlib.import_module(library)
    except (ImportError, RuntimeError, OSError):
        return None

    def decode(content: bytes) -> np.ndarray:
        tensor = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        image = module.decode_image(tensor, mode="RGB")
        if image.dim() == 4:  # the frames of an animation
            image = image[0]
        if image.dtype == torch.uint16:
            image = (image.int() >> 8).to(torch.uint8)
        return image.permute(1, 2, 0).numpy()
    return decode


def compared(wanted: list[np.ndarray], decode, images: list[bytes]) -> str:
    """Whether the pixels are the same, or by how much they differ."""
    if decode is None:
        return "not installed"
    try:
        found = [decode(content) for content in images]
    except Exception as error:  # each library refuses with another class
        return f"refused ({type(error).__name__})"
    if any(one.shape != two.shape for one, two in zip(wanted, found, strict=True)):
        return f"another shape: {found[0].shape[:2]} for {wanted[0].shape[:2]}"
    apart = [np.abs(one.astype(int) - two.astype(int)) for one, two in
             zip(wanted, found, strict=True)]
    if not any(each.any() for each in apart):
        return "the same"
    share = statistics.mean(float((each > 0).mean()) for each in apart)
    return f"{100 * share:.2g} % differ, by up to {max(int(each.max()) for each in apart)}"


def milliseconds(decode, images: list[bytes]) -> float:
    """Processor time of an image, the least of three rounds."""
    rounds = []
    for _ in range(3):
        start = time.process_time()
        for content in images:
            decode(content)
        rounds.append(time.process_time() - start)
    return 1e3 * min(rounds) / len(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=16)
    count = parser.parse_args().images
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    ways = {"torchvision": other("torchvision.io"), "TorchCodec": other("torchcodec.decoders")}
    print("| format | Pillow ms | ours to 224, ms | " + " | ".join(
        f"{name} pixels | {name} ms" for name in ways) + " |")
    for label, (name, mode, options) in FORMATS.items():
        images = encoded(count, name, mode, options)
        wanted = [pillow(content) for content in images]
        cells = [label, f"{milliseconds(pillow, images):.2f}",
                 f"{milliseconds(lambda one: decode_images([one], [''], 224), images):.2f}"]
        for decode in ways.values():
            verdict = compared(wanted, decode, images)
            known = decode is not None and not verdict.startswith("refused")
            cells += [verdict, f"{milliseconds(decode, images):.2f}" if known else ""]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
