#!/usr/bin/env bash
# Software: datasets 5.2.0, Pillow 13.0.0
# Expected: imagefolder takes every folder under the data folder for a class. At most a folder named
#   exactly "test" beside "train" is a split.
# Seen: "test" as a word of a folder's name is enough. With the classes "flask" and "test_tube" one
#   class becomes a split named "test" without labels, and all images of the other are left out,
#   without a word. A class named "dev" inside train/ stands in two splits: its images are trained on
#   and validated on.
# Matters: classes arrive over time and are named by others. One new class whose name has such a
#   word removes the earlier classes or lets validation images into training.
# Another version: DATASETS_VERSION=5.1.0 findings/datasets_class_named_test.sh
set -euo pipefail
packages=(
  "datasets==${DATASETS_VERSION:-5.2.0}"
  "pillow==${PILLOW_VERSION:-13.0.0}"
)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if command -v uv > /dev/null; then
  uv venv --quiet "$folder/venv"
  uv pip install --quiet --python "$folder/venv/bin/python" "${packages[@]}"
else
  python3 -m venv "$folder/venv"
  "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "${packages[@]}"
fi
cd "$folder"
export HF_HUB_OFFLINE=1 HF_HOME="$folder/hf"
printf 'with %s\n' "${packages[@]}"
venv/bin/python - << 'PYTHON'
import pathlib

import datasets
from PIL import Image

datasets.disable_progress_bars()


def splits(folder, classes, under=""):
    """Split name -> label of each of its images, or None where there are no labels."""
    for name in classes:
        target = pathlib.Path(folder, under, name)
        target.mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (4, 4), (number, 0, 0)).save(target / f"{number}.png")
    loaded = datasets.load_dataset("imagefolder", data_dir=folder, cache_dir="cache")
    found = {}
    for name, split in loaded.items():
        labelled = "label" in split.features
        found[name] = ([split.features["label"].int2str(label) for label in split["label"]]
                       if labelled else [None] * len(split))
    print(f"{folder}: classes {', '.join(classes)}, three images each")
    for name, labels in found.items():
        print(f"  split {name}: {len(labels)} images, labels {sorted(set(map(str, labels)))}")
    return found


plain = splits("plain", ["beaker", "flask"])
new_class = splits("with_test_tube", ["flask", "test_tube"])
dev = splits("with_dev", ["beaker", "dev"], under="train")
same = (list(plain) == ["train"] and len(plain["train"]) == 6
        and new_class == {"test": [None] * 3}
        and len(dev["train"]) == 6 and dev["validation"] == ["dev"] * 3)
raise SystemExit(None if same else "changed: other splits are made")
PYTHON
