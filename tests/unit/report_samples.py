"""Realistic results for the report's tests: a stream of any length, kept or forgotten.

Loaded with runpy by the tests that need it (a test folder is no package).
"""

import json

import numpy as np

from partialhn.config import Config, DataConfig, TrainConfig
from partialhn.evaluation import metrics

ANIMALS = ("goldfish", "salamander", "bullfrog", "tailed frog", "alligator", "boa", "trilobite",
           "scorpion", "black widow", "tarantula", "centipede", "goose", "koala", "jellyfish")


def matrix(n_tasks, level, drop, seed, spread=0.035):
    """R: `level` when learned, each later task costs an earlier one about `drop`."""
    draw = np.random.default_rng(seed)
    learned_T = np.clip(draw.normal(level, spread, n_tasks), 0.05, 1)
    table = [[None] * n_tasks for _ in range(n_tasks)]
    for j in range(n_tasks):
        value = learned_T[j]
        for i in range(j, n_tasks):
            table[i][j] = round(float(np.clip(value, 0, 1)), 4)
            value -= max(draw.normal(drop, drop), -0.002)
    return table


def summary(table):
    found = metrics.summarise(table)
    return {"acc": found.accuracy, "learning_accuracy": found.learning_accuracy,
            "forgetting": found.forgetting, "bwt": found.backward_transfer}


def bound(table, seconds, bytes_per_task):
    return {**summary(table), "accuracy_matrix": table, "seconds": seconds,
            "bytes_per_task": bytes_per_task}


def epochs_of(tasks, n_epochs, table, seed):
    draw = np.random.default_rng(seed)
    for index, task in enumerate(tasks):
        for epoch in range(1, n_epochs + 1):
            done = 1 - np.exp(-3.2 * epoch / n_epochs)
            loss = 1.9 * (1 - done) + 0.42 + draw.normal(0, 0.012)
            reached = table[index][index]
            yield {"task": task["name"], "task_index": index, "epoch": epoch,
                   "loss": loss + 0.02, "cross_entropy": loss,
                   "regulariser": 0.02 if index else 0.0,
                   "accuracy": min(1.0, 0.2 + (reached + 0.08 - 0.2) * done),
                   "validation_accuracy": 0.2 + (reached - 0.2) * done + draw.normal(0, 0.006),
                   "seconds": 1.1}


def sample(n_tasks=5, level=0.66, drop=0.0008, gap=0.012, n_epochs=10, n_classes=10, seed=3):
    """The result of a run as `result.json` holds it, through JSON and back."""
    names = [f"animals-{i}" for i in range(n_tasks)]
    tasks = [{"name": name, "classes": [f"{ANIMALS[(i * n_classes + k) % len(ANIMALS)]}"
                                        for k in range(n_classes)],
              "train_images": 450 * n_classes, "validation_images": 50 * n_classes,
              "test_images": 50 * n_classes, "bad_images": [], "transform": "none"}
             for i, name in enumerate(names)]
    table = matrix(n_tasks, level, drop, seed)
    draw = np.random.default_rng(seed)
    per_task = [{"name": name, "train": float(draw.normal(11.4, 0.4)),
                 "evaluate": 0.35 + 0.12 * i, "register": float(draw.normal(1.9, 0.1))}
                for i, name in enumerate(names)]
    stages = {"startup": 6.1, "data": 2.3, "trunk": 84.0, "features": 4.8 * n_tasks,
              "train": sum(row["train"] for row in per_task),
              "evaluate": sum(row["evaluate"] for row in per_task),
              "register": sum(row["register"] for row in per_task)}
    config = Config(data=DataConfig(data="/data/tiny-imagenet", tasks=n_tasks),
                    train=TrainConfig(epochs=n_epochs, compare=("separate_heads", "naive")))
    result = {
        "name": "tiny-animals", "seed": 0, "config": config.to_dict(), "strategy": "partial_hn",
        "tasks": tasks, **summary(table), "accuracy_matrix": table,
        "seconds": {"total": sum(stages.values()) + 1.2, "stages": stages, "per_task": per_task},
        "without_task_id": {
            "acc": 0.421, "acc_given": 0.66, "task_accuracy": 0.573, "acc_detector": 0.392,
            "acc_entropy": 0.334, "acc_combined": 0.421, "known_rejected": 0.031,
            "rejection_auroc": 0.71},
        "class_incremental": {"last": 0.421, "average_incremental": 0.536, "after_task":
                              [0.7 - 0.279 * i / max(1, n_tasks - 1) for i in range(n_tasks)]},
        "feature_bytes": 207_000_000 * n_tasks // 5,
        "feature_keys": [f"{i:02d}9f3c1e7ab24d60" for i in range(n_tasks)],
        "images_decoded": 5500 * n_tasks, "peak_rss_bytes": 1_840_000_000,
        "checkpoint_bytes": 4_470_000 + 2_900 * n_tasks, "bytes_per_task": 2_900,
        "trunk_bytes": 1_110_000, "shared_bytes": 3_360_000,
        "macs": {"trunk": 30_400_000, "head": 13_100_000, "frozen_share": 0.699},
        "weights": {"generated": 823_430, "trunk": 271_480},
        "bounds": {
            "separate_heads": bound(matrix(n_tasks, level + gap, 0.0, seed), 10.2 * n_tasks,
                                    3_290_000),
            "naive": bound(matrix(n_tasks, level + 0.01, 0.09 if n_tasks < 10 else 0.025, 7),
                           9.7 * n_tasks, 5_200)},
        "epochs": list(epochs_of(tasks, n_epochs, table, seed)),
        "model_uri": "models:/tiny-animals@champion",
        "versions": [{"task": name, "version": str(i + 1), "uri": f"models:/tiny-animals/{i + 1}",
                      "run_id": f"{i:02d}4b1d0c7f7a4e2b9f3d", "aliases": [f"task-{name}"]
                      + (["champion"] if i == n_tasks - 1 else [])}
                     for i, name in enumerate(names)],
        "tracking_uri": "sqlite:////data/partialhn/mlflow.db", "storage": "/data/partialhn",
        "partialhn_version": "0.1.0", "finished": "2026-11-27T15:48Z",
        "versions_of_libraries": {"torch": "2.11.0", "ray": "2.52.1", "mlflow": "3.10.0"},
        "device": "cpu", "weights_hash": "5d1f0a4c9e3b27f8",
    }
    return json.loads(json.dumps(result))


def forgetful(n_tasks=5):
    """A stream that loses what it learned and stays far below separate heads."""
    return sample(n_tasks, drop=0.03 if n_tasks < 10 else 0.012, gap=0.05)


def refreshed():
    """Three tasks, of which the first was learned again with more images, and the second from other
    images alone: five slots.
    """
    result = sample(5)
    for index, name in enumerate(("a", "b", "c", "a/2026-11", "b/=2026-12")):
        result["tasks"][index] |= {"name": name, "test_images": 30 + index,
                                   "bad_images": [{"id": f"{index}.png", "reason": "cut off"}]}
    result["review"] = [{"task": task["name"], "index": index, "images": 30, "ridge": None,
                         "confused": [], "examples": []}
                        for index, task in enumerate(result["tasks"])]
    return json.loads(json.dumps(result))


def minimal(table=((0.5, None), (0.4, 0.6))):
    """Nothing but the accuracy matrix."""
    return {"accuracy_matrix": [list(row) for row in table]}


def hostile():
    """Names that are markup, shell and template syntax, or move a terminal's cursor."""
    result = sample(3)
    evil = "<script>alert('x')</script>$body ${title} \"&\x1b[2J; rm -rf /"
    result["name"] = evil
    rows = zip(result["tasks"], result["seconds"]["per_task"], strict=True)
    for number, (task, row) in enumerate(rows):
        task["name"] = row["name"] = f"{number}{evil}".replace("/", "|")  # a / makes it a slot
        task["classes"] = [evil, "</title><img src=x onerror=alert(1)>"]
    for key in ("model_uri", "device", "weights_hash", "storage"):
        result[key] = evil
    result["tracking_uri"] = "postgresql://mlflow:secret@db.example/mlflow"
    result["versions"][0]["aliases"] = [evil]
    return result
