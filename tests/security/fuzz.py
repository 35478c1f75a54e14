"""Seeded mutations of real files against every reader, under a memory bound.

    python tests/security/fuzz.py FOLDER TARGET FIRST COUNT

A reader may succeed or raise InputError or IntegrityError. Everything else is printed with its
seed and makes the exit code 1; a crash of the process shows as a negative one, and the file
FOLDER/last says at which case.
"""

import copy
import dataclasses
import hashlib
import io
import json
import resource
import struct
import sys
import traceback
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import torch
from PIL import Image

from partialhn.checkpoints.model import Model, TaskInfo, empty_parts
from partialhn.config import BackboneConfig, Config, DataConfig, load_config
from partialhn.data.datasets import open_stream
from partialhn.data.decode import decode_images
from partialhn.errors import InputError, IntegrityError
from partialhn.evaluation.answer_sample import SCHEMA, check_sample, read_sample
from partialhn.features.manifest import FeatureRecipe
from partialhn.features.store import FeatureStore
from pipelines.gate import load_policy
from pipelines.platform.storage import open_storage
from pipelines.registry.history import History, Move

HEADROOM = 1024 ** 3
"""Bytes of address space that reading may take beyond what is loaded."""
EXTREME = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2 ** 63 - 1, 2 ** 64 - 1)
WEIRD = (None, True, -1, 0, 1.5, float("nan"), 10 ** 30, "", "x", "../../etc/passwd", "\0", [], {},
         [[]], {"a": 1}, [1] * 50, "y" * 5000)


def mutate(content: bytes, rng: np.random.Generator) -> bytes:
    """One to four changes: bytes flipped, extreme numbers written, pieces cut or repeated."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 5))):
        if not data:
            break
        at, kind = int(rng.integers(len(data))), int(rng.integers(6))
        length = int(rng.integers(1, 64))
        if kind == 0:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            number = EXTREME[int(rng.integers(len(EXTREME)))]
            form = "<Q" if number > 0xFFFFFFFF else ("<I", ">I")[int(rng.integers(2))]
            packed = struct.pack(form, number)
            data[at:at + len(packed)] = packed
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            del data[at:at + length]
        elif kind == 4:
            data[at:at] = data[at:at + length]
        else:
            data[at:at + length] = rng.bytes(length)
    return bytes(data)


def mutate_json(content: bytes, rng: np.random.Generator) -> bytes:
    """Bytes as above, or one value replaced by one that does not belong there."""
    if rng.integers(3) == 0:
        return mutate(content, rng)
    fields = json.loads(content)
    place, key = fields, None
    while isinstance(place, dict | list) and len(place) and (key is None or rng.integers(3)):
        parent = place
        key = (sorted(place)[int(rng.integers(len(place)))] if isinstance(place, dict)
               else int(rng.integers(len(place))))
        place = place[key]
    if rng.integers(4) == 0:
        del parent[key]
    else:
        parent[key] = copy.deepcopy(WEIRD[int(rng.integers(len(WEIRD)))])
    return json.dumps(fields).encode()


class Images:
    """Encoded images of every form that is decoded."""

    def __init__(self, folder):
        pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
        self.files = []
        for form in ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM"):
            encoded = io.BytesIO()
            Image.fromarray(pixels).save(encoded, form)
            self.files.append(encoded.getvalue())

    def run(self, rng):
        content = mutate(self.files[int(rng.integers(len(self.files)))], rng)
        decode_images([content], ["image"], 16)


class Parquet:
    """A data set of real digits in one Parquet file."""

    def __init__(self, folder):
        self.folder = folder / "data"
        whole = open_stream(DataConfig(data="digits", tasks=5), folder / "datasets")[0]
        rows = [{"image": {"bytes": image, "path": "x.png"}, "label": int(label)} for image, label
                in zip(whole.train.read()[:60], whole.train.label_N, strict=False)]
        self.folder.mkdir()
        pq.write_table(pa.Table.from_pylist(rows), folder / "whole.parquet", row_group_size=20)
        self.content = (folder / "whole.parquet").read_bytes()

    def run(self, rng):
        (self.folder / "train.parquet").write_bytes(mutate(self.content, rng))
        for experience in open_stream(DataConfig(data=str(self.folder), tasks=1), self.folder):
            decode_images(experience.train.read(), experience.train.ids(), 16)
            assert experience.fingerprint


class Features:
    """Arrow shards whose manifest vouches for them, and manifests."""

    def __init__(self, folder):
        self.sets = [StoredSet(folder, dtype, compression) for dtype, compression in
                     (("float32", "none"), ("int8", "none"), ("int8", "lz4"))]

    def run(self, rng):
        self.sets[int(rng.integers(len(self.sets)))].run(rng)


class StoredSet:
    """One set of features."""

    def __init__(self, folder, dtype, compression):
        self.store = FeatureStore(pafs.LocalFileSystem(), str(folder))
        self.recipe = FeatureRecipe("t", "d", "none", 16, 1, "none", 0, dtype, 10, compression)
        z_NVCHW = torch.arange(10 * 12.0).reshape(10, 1, 3, 2, 2)
        shard = self.store.write_shard(self.recipe, 0, z_NVCHW, np.arange(10) % 2,
                                       [str(i) for i in range(10)], seconds=0.1)
        self.manifest = self.store.commit(self.recipe, [shard], (1, 3, 2, 2))
        self.place = Path(self.store.folder(self.recipe.key))
        self.shard = (self.place / shard.name).read_bytes()
        self.text = (self.place / "manifest.json").read_bytes()
        self.sidecar = (self.place / "part-00000.json").read_bytes()

    def run(self, rng):
        kind = int(rng.integers(3))
        if kind == 0:
            content = mutate(self.shard, rng)
            shard = dataclasses.replace(self.manifest.shards[0], bytes=len(content),
                                        name="part-00001-000000000000.arrow",
                                        sha256=hashlib.sha256(content).hexdigest())
            (self.place / shard.name).write_bytes(content)
            found = self.store.open(dataclasses.replace(self.manifest, shards=(shard,)))
            found.gather(torch.arange(len(found)), torch.zeros(len(found), dtype=torch.int64))
        elif kind == 1:
            (self.place / "manifest.json").write_bytes(mutate_json(self.text, rng))
            manifest = self.store.find(self.recipe)
            found = self.store.open(manifest)
            found.gather(torch.arange(len(found)), torch.zeros(len(found), dtype=torch.int64))
        else:
            (self.place / "part-00000.json").write_bytes(mutate_json(self.sidecar, rng))
            self.store.find_shard(self.recipe.key, 0)


class Checkpoints:
    """Models: tensors that the fields vouch for, and fields."""

    def __init__(self, folder):
        self.folder = folder / "model"
        config = Config(DataConfig(input_size=16), BackboneConfig(freeze_depth=4))
        trunk, strategy = empty_parts(config)
        strategy.add_task(2)
        strategy.finish(0)
        Model(config, trunk, strategy, (TaskInfo("a", ("x", "y")),)).save(self.folder)
        self.tensors = (self.folder / "model.safetensors").read_bytes()
        self.fields = (self.folder / "model.json").read_bytes()

    def run(self, rng):
        tensors, fields = self.tensors, self.fields
        if rng.integers(2):
            head = 8 + int.from_bytes(tensors[:8], "little")  # where the format can go wrong
            tensors = mutate(tensors[:head], rng) + tensors[head:]
            digest = hashlib.sha256(tensors).hexdigest()
            fields = json.dumps(json.loads(fields) | {"tensors_sha256": digest}).encode()
        else:
            fields = mutate_json(fields, rng)
        (self.folder / "model.safetensors").write_bytes(tensors)
        (self.folder / "model.json").write_bytes(fields)
        Model.load(self.folder)


class Texts:
    """History entries, samples, policies and configurations."""

    def __init__(self, folder):
        self.folder = folder
        self.storage = open_storage(str(folder / "store"))
        History(self.storage, "s").append(Move("champion", 1, "trained", "x", metrics={"a": 1.0},
                                               decision={"passed": True}), "r")
        self.entry = folder / "store/history/s/00000001.json"
        self.entry_text = self.entry.read_bytes()
        rows = [{"image": b"abc", "task": "t", "label": "a", "expected": "a", "probability": 0.9}]
        pq.write_table(pa.Table.from_pylist(rows * 20, SCHEMA), folder / "sample.parquet")
        self.sample = (folder / "sample.parquet").read_bytes()
        self.policy = b"max_loss_on_earlier_task: 0.01\nmin_above_chance: null\nmax_seconds: 60\n"
        self.config = b"data: {data: x, tasks: 3}\ntrain: {epochs: 2, compare: [naive]}\n"

    def run(self, rng):
        kind = int(rng.integers(4))
        if kind == 0:
            self.entry.write_bytes(mutate_json(self.entry_text, rng))
            History(self.storage, "s").entries()
        elif kind == 1:
            path = self.folder / "mutated.parquet"
            path.write_bytes(mutate(self.sample, rng))
            check_sample(read_sample(path), lambda images, task: (["a"] * len(images),
                                                                  [0.9] * len(images)))
        else:
            path = self.folder / "mutated.yaml"
            path.write_bytes(mutate(self.policy if kind == 2 else self.config, rng))
            (load_policy if kind == 2 else load_config)(path)


TARGETS = {"images": Images, "parquet": Parquet, "features": Features, "checkpoints": Checkpoints,
           "texts": Texts}


def limit_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + HEADROOM, used + HEADROOM))


def main(folder: Path, name: str, first: int, count: int) -> int:
    folder.mkdir(parents=True)
    torch.set_num_threads(1)
    target = TARGETS[name](folder)
    pa.set_cpu_count(1)
    limit_memory()
    refused = failed = 0
    for seed in range(first, first + count):
        (folder / "last").write_text(str(seed))
        try:
            target.run(np.random.default_rng([seed, len(name)]))
        except (InputError, IntegrityError):
            refused += 1
        except BaseException:
            failed += 1
            print(f"{name} seed {seed}:\n{traceback.format_exc(limit=-4)}")
    print(f"{name}: {count} cases, {refused} refused, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
