#!/usr/bin/env bash
# Software: Optuna 5.0.0
# Expected: with seeded samplers and the same objective two studies prune the same trials, whatever
#   they are called.
# Seen: the bracket of a trial comes from a checksum of the study's name and the trial's number, so
#   another name prunes other trials and spends another number of steps. A study without a name gets
#   a random one: its pruning cannot be repeated with any seed.
# Matters: a search is compared with another by its cost at a seed. Studies that are named after the
#   date or the user differ by chance, and a paper's seed does not reproduce its search.
# Another version: OPTUNA_VERSION=4.9.0 findings/optuna_hyperband_study_name.sh
set -euo pipefail
packages=(
  "optuna==${OPTUNA_VERSION:-5.0.0}"
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
import optuna

optuna.logging.set_verbosity(optuna.logging.ERROR)


def search(name, pruner):
    """Values tried, and the last step that each trial reached."""
    study = optuna.create_study(study_name=name, pruner=pruner,
                                sampler=optuna.samplers.RandomSampler(seed=0))

    def objective(trial):
        x = trial.suggest_float("x", 0, 1)
        for step in range(27):
            trial.report(abs(x - 0.5) + 1 / (step + 1), step)
            if trial.should_prune():
                raise optuna.TrialPruned
        return abs(x - 0.5)

    study.optimize(objective, n_trials=60)
    return ([trial.params["x"] for trial in study.trials],
            [trial.last_step for trial in study.trials])


def hyperband(name):
    return search(name, optuna.pruners.HyperbandPruner(1, 27, 3))


def halving(name):
    return search(name, optuna.pruners.SuccessiveHalvingPruner(1, 3))


(values, monday), (also_values, tuesday) = hyperband("monday"), hyperband("tuesday")
_, again = hyperband("monday")
_, unnamed = hyperband(None)
_, also_unnamed = hyperband(None)
print("the same values tried under both names:", values == also_values)
print(f"steps in all: monday {sum(monday)}, monday again {sum(again)}, tuesday {sum(tuesday)}; "
      f"without a name {sum(unnamed)} and {sum(also_unnamed)}")
plain = halving("monday")[1] == halving("tuesday")[1]
print("successive halving alone is the same under both names:", plain)
same = (values == also_values and monday == again and monday != tuesday
        and unnamed != also_unnamed and plain)
raise SystemExit(None if same else "changed: the name no longer decides what is pruned")
PYTHON
