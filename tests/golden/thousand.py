"""A long stream of small tasks, and what grows with it.

    PARTIALHN_TEST_DATA=DATA python tests/golden/thousand.py --folder long --output long.json \
        [--tasks 1000] [--batch 20] [--storage s3://bucket/prefix?endpoint=URL]

Pairs of handwritten digits (drawn classes, turned and shifted) and, where the folder of test images
is given, pairs of Tiny-ImageNet classes arrive in the inbox, `--batch` at a time, and a pass of its
own process learns them. Around the marks (`--marks`) single tasks arrive, and a pass with one task
is timed, with the bytes that it stores. At each mark the commands that read are timed, and memory
and report are measured. Every number is written beside its ratio to that at the first mark. Started
again with the same folder, it goes on after the last pass that ended.
"""

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from pipelines.platform.storage import Storage, open_storage

CONFIG = {
    "data": {"data": "inbox", "input_size": 32}, "hypernet": {"fresh_columns": 8},
    "backbone": {"freeze_depth": 3, "trunk_epochs": 10},
    "features": {"views": 2, "shard_rows": 2048}, "train": {"epochs": 6},
    "compute": {"threads": 1}}
POLICY = {"min_above_chance": None, "max_p_value": None, "inbox": {"max_duplicate_share": 1.0}}
"""So many tasks from so few images have some images in common."""
IMAGES, TESTS = 20, 15
"""Training and test images of a class."""
NAME = "long"
MEMORY = """
import resource, sys
from pipelines.serving.model import RegistrySource, self_test
predictor, _ = RegistrySource(sys.argv[1], sys.argv[2], sys.argv[3]).load()
self_test(predictor)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


class Arrivals:
    """Small tasks of two drawn classes, from digits and from pieces of Tiny-ImageNet."""

    def __init__(self, data: str | None) -> None:
        self.digits = load_digits()
        self.tiny: dict[str, pa.Table] = {}
        folder = Path(data or "") / "tiny-imagenet-32"
        if data and folder.is_dir():
            for split in ("train", "test"):
                self.tiny[split] = pa.concat_tables(
                    [pq.read_table(path) for path in sorted(folder.glob(f"{split}*.parquet"))])

    def write(self, storage: Storage, task: int) -> None:
        """Puts a task into the inbox of a storage."""
        rng = np.random.default_rng(task)
        tiny = bool(self.tiny) and task % 4 == 3
        folder = storage.path("inbox", f"task-{task:04d}")
        for split, rows in (self._tiny(rng) if tiny else self._digits(rng)).items():
            sink = io.BytesIO()
            pq.write_table(pa.Table.from_pylist(rows), sink)
            storage.put_if_absent(f"{folder}/{split}.parquet", sink.getvalue())
        storage.put_if_absent(f"{folder}/_READY", b"")

    def _digits(self, rng: np.random.Generator) -> dict[str, list[dict]]:
        turn, rows = int(rng.integers(4)), {"train": [], "test": []}
        for label, digit in enumerate(rng.choice(10, 2, replace=False)):
            chosen = rng.permutation(np.flatnonzero(self.digits.target == digit))
            for place, image in enumerate(chosen[:IMAGES + TESTS]):
                pixels_HW = np.rot90((self.digits.images[image] * 15.9).astype(np.uint8), turn)
                pixels_HW = np.roll(pixels_HW, int(rng.integers(-1, 2)), 1)
                sink = io.BytesIO()
                Image.fromarray(np.ascontiguousarray(pixels_HW)).save(sink, "PNG")
                rows["train" if place < IMAGES else "test"].append(row(sink.getvalue(), label))
        return rows

    def _tiny(self, rng: np.random.Generator) -> dict[str, list[dict]]:
        rows: dict[str, list[dict]] = {"train": [], "test": []}
        for label, name in enumerate(rng.choice(100, 2, replace=False)):
            for split, count in (("train", IMAGES), ("test", TESTS)):
                table = self.tiny[split]
                found = table.filter(pa.compute.equal(table["label"], int(name)))["image"]
                rows[split] += [row(found[int(place)].as_py()["bytes"], label)
                                for place in rng.permutation(len(found))[:count]]
        return rows


def row(image: bytes, label: int) -> dict:
    return {"image": {"bytes": image, "path": ""}, "label": label}


class Stream:
    """A stream in a storage, which commands of their own processes work on."""

    def __init__(self, folder: Path, uri: str | None) -> None:
        self.folder, self.uri = folder, uri or str(folder / "store")
        self.storage, self.database = open_storage(self.uri), f"sqlite:///{folder / 'mlflow.db'}"
        (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
        (folder / "policy.yaml").write_text(yaml.safe_dump(POLICY))

    def partialhn(self, *words: str) -> tuple[str, dict[str, float]]:
        """Output of a command, and its wall and processor seconds."""
        return timed([sys.executable, "-c", "from pipelines.cli.entry import main; main()", *words,
                      "--storage", self.uri, "--tracking-uri", self.database], self.folder)

    def learn(self) -> dict[str, float]:
        """One pass; its seconds, and the bytes that it stored."""
        before = self.bytes()
        out, seconds = self.partialhn(
            "retrain", "--name", NAME, "--config", str(self.folder / "config.yaml"), "--policy",
            str(self.folder / "policy.yaml"), "--json")
        said = json.loads(out.splitlines()[-1])
        stages = said["seconds"]
        return seconds | {"bytes": self.bytes() - before, "tasks learned": len(said["learned"]),
                          **{f"stage {key}": value for key, value in stages.items()}}

    def bytes(self) -> int:
        """Bytes of everything that the product has stored."""
        inbox = self.storage.path("inbox")
        database = self.folder / "mlflow.db"
        return (database.stat().st_size if database.exists() else 0) + sum(
            file.size for file in self.storage.list(self.storage.root)
            if not file.path.startswith(inbox))

    def reading(self, task: int) -> dict[str, float]:
        """The commands that read, the memory of a server, and the size of the report."""
        image, report = self.folder / "image.png", self.folder / "report.html"
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(image)
        found: dict[str, float] = {}
        for name, words in {
                "models list": ("models", "list", "--name", NAME),
                "show": ("show", "--name", NAME),
                "predict": ("predict", "--model", f"models:/{NAME}@champion", "--task",
                            f"task-{task:04d}", "--input", str(image), "--output",
                            str(self.folder / "answers.parquet")),
                "report": ("report", "--name", NAME, "--output", str(report))}.items():
            seconds = self.partialhn(*words)[1]
            found |= {f"{name} {key}": value for key, value in seconds.items()}
        out, _ = timed([sys.executable, "-c", MEMORY, f"models:/{NAME}@champion", self.uri,
                        self.database], self.folder)
        return found | {"serving memory": float(out), "report bytes": report.stat().st_size}


def timed(words: list[str], folder: Path) -> tuple[str, dict[str, float]]:
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder, check=False,
                          env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{words} failed:\n{done.stdout}\n{done.stderr}")
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.stdout, {"wall": round(time.perf_counter() - begun, 2),
                         "processor": round(processor, 2)}


def live(stream: Stream, arrivals: Arrivals, tasks: int, batch: int, marks: list[int]) -> dict:
    """Lets the tasks arrive; returns what was measured at each mark."""
    kept = stream.folder / "measured.json"
    found, passes = json.loads(kept.read_text()) if kept.exists() else ({}, [])
    done = sum(measured["tasks"] for measured in passes)
    while done < tasks:
        one = done in marks
        count = 1 if one else min(batch, tasks - done,
                                  *(mark - done for mark in marks if mark > done))
        for task in range(done, done + count):
            arrivals.write(stream.storage, task)
        measured = stream.learn() | {"tasks": count}
        passes.append(measured)
        if one:
            found[str(done)] = {f"pass {key}": value for key, value in measured.items()
                                } | stream.reading(done)
            print(json.dumps({"at": done, **found[str(done)]}), flush=True)
        done += count
        kept.write_text(json.dumps([found, passes]))
        print(json.dumps({"learned": done, **measured}), flush=True)
    first = found[str(marks[0])]
    ratios = {mark: {key: round(value / first[key], 2) for key, value in row.items() if first[key]}
              for mark, row in found.items()}
    return {"config": CONFIG, "batch": batch, "marks": found, "ratios": ratios, "passes": passes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tasks", type=int, default=1001)
    parser.add_argument("--batch", type=int, default=20, help="tasks that arrive at a time")
    parser.add_argument("--marks", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--storage", help="s3://...; default: a folder")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    found = live(Stream(given.folder.absolute(), given.storage),
                 Arrivals(os.environ.get("PARTIALHN_TEST_DATA")), given.tasks, given.batch,
                 given.marks)
    given.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
