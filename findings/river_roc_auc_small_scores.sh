#!/usr/bin/env bash
# Software: River 0.26.1
# Expected: the area under the ROC curve depends on the order of the scores alone, so scores that are
#   all divided by 1000 have the same area.
# Seen: metrics.ROCAUC counts at ten fixed thresholds between 0 and 1. Scores that separate the
#   classes without a mistake give 1.0, the same scores divided by 1000 give 0.5. RollingROCAUC of
#   the same library gives 1.0 for both.
# Matters: with many classes, or a rare one, all probabilities of a class are small, and a stream's
#   curve then reads "no better than chance" for a perfect model.
# Another version: RIVER_VERSION=0.25.0 findings/river_roc_auc_small_scores.sh
set -euo pipefail
packages=(
  "river==${RIVER_VERSION:-0.26.1}"
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
import random

from river import metrics

source = random.Random(0)
truth = [source.random() < 0.5 for _ in range(1000)]
scores = [source.uniform(0.55, 0.95) if label else source.uniform(0.05, 0.45) for label in truth]
areas = {}
for divisor in (1, 1000):
    streaming, rolling = metrics.ROCAUC(), metrics.RollingROCAUC(window_size=len(truth))
    for label, score in zip(truth, scores):
        streaming.update(label, {True: score / divisor, False: 1 - score / divisor})
        rolling.update(label, score / divisor)
    areas[divisor] = (streaming.get(), rolling.get())
    print(f"scores divided by {divisor}: ROCAUC {areas[divisor][0]:.3f}, "
          f"RollingROCAUC {areas[divisor][1]:.3f}")
same = (min(areas[1]) > 0.999 and abs(areas[1000][0] - 0.5) < 0.01
        and areas[1000][1] > 0.999)
raise SystemExit(None if same else "changed: small scores give another area")
PYTHON
