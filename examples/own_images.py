"""Learn from your own folder of images, train/<class>/*, two classes at a time.

Use: python examples/own_images.py [IMAGES [FOLDER]]. Without IMAGES a small folder of
scikit-learn's digits is made.
"""

import sys
from pathlib import Path

import partialhn as phn


def make_images(target: Path) -> None:
    """Writes 120 images of each of the digits 0 to 5 as PNG files."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for label in range(6):
        folder = target / "train" / f"digit-{label}"
        folder.mkdir(parents=True, exist_ok=True)
        for number, pixels in enumerate(digits.images[digits.target == label][:120]):
            Image.fromarray((pixels * 15.9).astype("uint8")).save(folder / f"{number:03d}.png")


images = Path(sys.argv[1] if len(sys.argv) > 1 else "own-images")
if len(sys.argv) == 1 and not images.exists():
    make_images(images)
classes = sorted(path.name for path in (images / "train").iterdir())
stream = phn.Stream(images, tasks=len(classes) // 2, class_order="given", input_size=16,
                    trunk_epochs=5, epochs=5,
                    folder=sys.argv[2] if len(sys.argv) > 2 else "own-stream").learn()
print(stream.accuracy_matrix.round(3).to_string(na_rep=""))
print(stream.predict(images / "train" / classes[0], task="0").head(3).to_string(index=False))
