"""Labels images with an ONNX file of one task; needs numpy, onnxruntime and Pillow alone.

python examples/run_exported.py pets.onnx IMAGE...
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession(sys.argv[1])
record = json.loads(session.get_modelmeta().custom_metadata_map["partialhn"])
steps = record["preprocessing"]


def pixels(path):
    """The pixels of an image file, float32 of 0 to 1: (3, size, size)."""
    image = Image.open(path)
    if image.mode.startswith("I"):  # 16 bits, of which convert would make white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image = image.convert("RGB")
    side = min(image.size) * steps["crop"]
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = None if steps["squash"] else (left, top, left + side, top + side)
    square = image.resize((steps["size"], steps["size"]),
                          Image.Resampling[steps["interpolation"].upper()], box=box)
    return np.asarray(square, np.float32).transpose(2, 0, 1) / 255


(logits,) = session.run(None, {"pixels": np.stack([pixels(path) for path in sys.argv[2:]])})
probabilities = np.exp(logits - logits.max(1, keepdims=True))
probabilities /= probabilities.sum(1, keepdims=True)
for path, row in zip(sys.argv[2:], probabilities, strict=True):
    print(f"{path}: {record['classes'][row.argmax()]}  (probability {row.max():.4f})")
