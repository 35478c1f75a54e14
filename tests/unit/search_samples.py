"""Records of searches with numbers that can be checked by hand."""

from partialhn.config import Config
from pipelines.search.state import Measured, TrialPlan, TrialRecord

BASE = Config().to_dict()


def measured(row=(0.5, 0.7), seconds=10.0, **changes):
    """A trial of two tasks that ended with this row, unless it says otherwise."""
    rows = tuple(tuple(row[:count]) for count in range(1, len(row) + 1))
    values = {"tasks": ("a", "b"), "rows": rows, "test_row": None, "train_seconds": seconds,
              "processor_seconds": seconds, "evaluate_seconds": 1.0, "epochs": 4,
              "feature_bytes": 1 << 30, "feature_seconds": 6.0, "serving_macs": 1000,
              "head_bytes": 400, "checkpoint_bytes": 5000, "bytes_per_task": 1024,
              "device": "cpu"}
    return Measured(**values | changes)


def plan(trial, depth=3, kind="search", seed=0, **params):
    config = BASE | {"backbone": BASE["backbone"] | {"freeze_depth": depth},
                     "train": BASE["train"] | {"seed": seed}}
    return TrialPlan(trial, kind, config, {"backbone.freeze_depth": depth} | params)


def record(trial, depth=3, row=(0.5, 0.7), seconds=10.0, *, status="finished", kind="search",
           seed=0, at=1.0, params=None, **changes):
    return TrialRecord(plan(trial, depth, kind, seed, **(params or {})), status,
                       "" if status == "finished" else "why",
                       None if status == "failed" else measured(row, seconds, **changes), at)
