"""Every goal for a GPU, measured in one run beside the ways of commit 4084f75.

    python tests/bench/gpu.py [--json gpu.json] [--cifar10 FOLDER] [--device cuda|cpu]
                              [--only PART ...]

`tests/bench/gpu.sh` runs it with the tests that need a GPU. It needs torch, torchvision, timm,
pyarrow and scikit-learn, and neither a network nor Ray nor MLflow. On a CPU it runs with small
sizes, to show that it works; goals for a GPU then have no answer. Without --cifar10 the main job
learns made images of the same size, and its accuracy has no answer.

Legend: N images, B batch, C channels, H W spatial.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import io
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from pathlib import Path

import device as steps_bench
import earlier
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import together
import torch
from photographs import photographs
from PIL import Image
from pyarrow.fs import LocalFileSystem
from rows import clock
from torch.profiler import ProfilerActivity, profile

from partialhn.config import BackboneConfig, Config
from partialhn.data.decode import decode, decode_images
from partialhn.features.extract import feature_jobs, shard_places
from partialhn.features.manifest import FeatureRecipe
from partialhn.features.shards import READERS, compute_shards
from partialhn.features.store import FeatureStore
from partialhn.networks.backbone import build_network
from partialhn.networks.cut import CutNetwork
from partialhn.networks.precision import configure_torch
from partialhn.networks.trunk import images_together
from partialhn.predict import Predictor
from partialhn.presets import preset
from partialhn.run import StreamRun
from partialhn.training.image_batches import Labelled
from partialhn.training.pretrain import network_optimiser, train_network
from partialhn.training.steps import recorder_for

MAIN_STEPS, MAIN_SECONDS, MAIN_ACCURACY = 4700, 25, 0.932
TRUNK_SECONDS = 8
SLIM, RESNET = "slim_resnet18", "torchvision:resnet18"


class Goals:
    """Collects answers, and prints each as it comes."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.rows = device, []

    def add(self, point: str, what: str, value: float, needed: float, *, at_most: bool = False,
            on_cpu: bool = False, **more: float | str) -> None:
        """on_cpu: whether the goal has an answer without a GPU."""
        holds = value <= needed if at_most else value >= needed
        known = (on_cpu or self.device.type == "cuda") and not math.isnan(value)
        self._keep({"point": point, "what": what,
                    "value": None if math.isnan(value) else round(value, 4),
                    "needed": f"at {'most' if at_most else 'least'} {needed:g}",
                    "holds": holds if known else None, **more})

    def open(self, point: str, what: str, why: str) -> None:
        """A goal for which nothing is measured."""
        self._keep({"point": point, "what": what, "value": None, "needed": "", "holds": None,
                    "why": why})

    def _keep(self, row: dict) -> None:
        self.rows.append(row)
        answer = {True: "yes", False: "NO", None: row.get("why", "needs a GPU")}[row["holds"]]
        value = "" if row["value"] is None else f"{row['value']:g}"
        extra = ", ".join(f"{key} {value}" for key, value in row.items() if key not in (
            "point", "what", "value", "needed", "holds", "why"))
        print(f"{row['point']:3} {row['what'][:74]:74} {value:>9} {row['needed']:14} {answer}"
              + f"   ({extra})" * bool(extra), flush=True)


def cuda(goals: Goals) -> bool:
    return goals.device.type == "cuda"


def the_step(goals: Goals, folder: Path, _: object = None) -> None:
    """Point 4: kernels of a step, and its time against its floor, at depth 3."""
    device = goals.device
    features = steps_bench.stored(3, folder / "steps").to(device)
    rounds, steps = (5, 300) if cuda(goals) else (2, 3)
    for precision, needed in (("bfloat16", 4.0), ("float32", 3.0)):
        total = 3 * (rounds + 2) * steps
        take = steps_bench.prepared(features, 3, precision, False, total)
        plain = steps_bench.milliseconds(take, device, rounds, max(3, steps // 10))
        floor = steps_bench.Floor(*steps_bench.speeds(device, precision))
        with floor:
            take()
        kernels = kernels_of(take, device)
        recorded = plain
        if cuda(goals):
            recorded = steps_bench.milliseconds(
                steps_bench.prepared(features, 3, precision, True, total), device, rounds, steps)
        goals.add("4", f"kernels of a step, {precision}", kernels, 90, at_most=True)
        goals.add("4", f"operations of a step, {precision}", floor.operations, 90, at_most=True,
                  on_cpu=True)
        goals.add("4", f"a step against its floor, {precision}", recorded / 1e3 / floor.seconds,
                  needed, at_most=True, recorded_ms=round(recorded, 3), plain_ms=round(plain, 3))


def kernels_of(take, device: torch.device) -> float:
    """Kernels, copies and fills that one unrecorded step launches; NaN on a CPU."""
    if device.type != "cuda":
        return math.nan
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        take()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in seen.events())


def at_once(goals: Goals, folder: Path, _: object = None) -> None:
    """Point 3: tasks, and trials of a search, at once in one process against one after the other.

    Fewer trials than a search of 40 has: their number a minute does not depend on it.
    """
    count, steps, epochs = (8, 300, 3) if cuda(goals) else (2, 3, 1)
    stored = steps_bench.stored(3, folder / "steps")
    features = stored.to(goals.device)
    for precision in ("bfloat16", "float32"):
        alone, both = (together.seconds_of_steps(features, precision, lanes, steps)
                       for lanes in (1, count))
        goals.add("3", f"{count} tasks at once / one after the other, steps a minute, {precision}",
                  count * alone / both, 4, steps_a_minute=round(60 * count * steps / both))
    trials = (8, 24) if cuda(goals) else (2, 2)
    (alone, spent_alone), (both, spent) = (
        together.seconds_of_trials(stored, goals.device, trials[place], lanes, epochs)
        for place, lanes in enumerate((1, count)))
    goals.add("3", f"trials of a search, {count} at once / one after the other, trials a minute",
              alone / trials[0] / (both / trials[1]), 4,
              trials_a_minute=round(60 * trials[1] / both))
    goals.add("3", "processor time of a trial among others / alone",
              spent / trials[1] / (spent_alone / trials[0]), 1.2, at_most=True, on_cpu=True)


def the_trunk(goals: Goals, folder: Path, _: object = None) -> None:
    """Point 2: steps of the trunk's training, recorded, against the earlier way."""
    del folder
    device, batch = goals.device, 64
    count = 64 * (150 if cuda(goals) else 8)
    images = Labelled(torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8),
                      torch.arange(count) % 2)
    config = BackboneConfig(trunk_epochs=4,
                            trunk_precision="bfloat16" if cuda(goals) else "float32")
    network = build_network(SLIM, 2, 0).to(device)
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
    timer = functools.partial(clock, device) if cuda(goals) else time.process_time
    recorded = build_network(SLIM, 2, 0).to(device)
    ours = train_network(recorded, images, config, "crop-flip",
                         network_optimiser(recorded, config), recorder=recorder_for(device, True))
    earlier_s, ours_s = [], []
    for number in range(1, config.trunk_epochs + 1):  # in turns: what disturbs one disturbs both
        start = timer()
        earlier.trunk_pass(network, images, batch, optimiser, number, 3e-3, config.trunk_precision)
        between = timer()
        next(ours)
        earlier_s.append(between - start)
        ours_s.append(timer() - between)
    steps = count // batch
    theirs, mine = (1e3 * min(seconds[1:]) / steps for seconds in (earlier_s, ours_s))
    goals.add("2", f"{MAIN_STEPS} steps of the trunk's training, seconds", mine * MAIN_STEPS / 1e3,
              TRUNK_SECONDS, at_most=True, step_ms=round(mine, 3), earlier_ms=round(theirs, 3))
    goals.add("2", "a step of it against the earlier way", mine / theirs, 1.05, at_most=True,
              on_cpu=True)


def the_features(goals: Goals, folder: Path, _: object = None) -> None:
    """Point 1: stored features against the slower of the bare trunk and of decoding, and against
    the earlier way.
    """
    for name, depth, side, count in ((RESNET, 2, 224, 2048 if cuda(goals) else 96),
                                     (RESNET, 9, 224, 2048 if cuda(goals) else 48)):
        experience = photographs(folder, count)
        for kind in ("ieee", "bfloat16"):
            one = one_network(goals, folder, experience, name, depth, side, kind)
            label = f"{name.rpartition(':')[2]}, depth {depth}, {kind}"
            if kind == "bfloat16":
                goals.add("1", f"features, {label}: slower of trunk and decoding / ours",
                          max(one["bare"], one["decoding"]) / one["ours"], 0.8,
                          **{key: round(1e3 * value) for key, value in one.items()})
            else:
                goals.add("1", f"features, {label}: the earlier way / ours",
                          one["earlier"] / one["ours"], 1.5, on_cpu=True,
                          images_a_second=round(count / one["ours"], 1))


def the_smallest_part(goals: Goals, folder: Path, _: object = None) -> None:
    """Point 1 at depth 1, where writing weighs most beside the trunk: the thread in which the trunk
    runs, against the trunk alone. It is a goal for two cores.
    """
    what = "features, slim_resnet18, depth 1: the bare trunk / the trunk's thread"
    if cuda(goals):
        goals.open("1", what, "needs a CPU")
        return
    config = dataclasses.replace(Config(), features=dataclasses.replace(
        Config().features, views=2, shard_rows=256))
    experience = photographs(folder, 768, (32, 32))
    trunk = CutNetwork.of(build_network(SLIM, 2), 1).trunk
    (job,) = feature_jobs(config, [experience], trunk)
    images_BCHW = decode(experience.train, 32).images_BCHW

    def ours() -> None:
        for _ in compute_shards(new_store(folder), trunk, [(job,)], shard_places([(job,)])):
            pass

    def bare() -> None:
        for chunk_BCHW in torch.split(images_BCHW.repeat(2, 1, 1, 1), images_together(trunk)):
            trunk(chunk_BCHW)

    mine, theirs = (best_of(work, goals.device, 5, time.thread_time) for work in (ours, bare))
    goals.add("1", what, theirs / mine, 0.9, on_cpu=True, trunk_s=round(theirs, 2),
              ours_s=round(mine, 2))


def one_network(goals: Goals, folder: Path, experience, name: str, depth: int, side: int,
                kind: str) -> dict[str, float]:
    """Seconds of each way."""
    device, config = goals.device, Config()
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, input_size=side),
        features=dataclasses.replace(config.features, views=1, shard_rows=256))
    network = build_network(name, 2, input_size=side)
    network.arithmetic = kind
    trunk = CutNetwork.of(network, depth).trunk.to(device)
    (job,) = feature_jobs(config, [experience], trunk)
    table = experience.train
    images_BCHW = decode(table, side).images_BCHW
    encoded, there_BCHW = table.read(), images_BCHW.to(device)

    def ours() -> None:
        for _ in compute_shards(new_store(folder), trunk, [(job,)], shard_places([(job,)])):
            pass

    def bare() -> None:
        for chunk_BCHW in torch.split(there_BCHW, images_together(trunk)):
            trunk(chunk_BCHW)

    def decoding() -> None:
        parts = [encoded[start:start + 64] for start in range(0, len(encoded), 64)]
        with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
            list(pool.map(lambda part: decode_images(part, [""] * len(part), side), parts))

    ways = {"ours": ours, "bare": bare, "decoding": decoding}
    if kind == "ieee":
        ways["earlier"] = lambda: earlier.features(new_store(folder), trunk, job)
    return {way: best_of(work, device) for way, work in ways.items()}


def new_store(folder: Path) -> FeatureStore:
    return FeatureStore(LocalFileSystem(), str(folder / uuid.uuid4().hex))


def best_of(work, device: torch.device, rounds: int = 3, timer=None) -> float:
    """Least seconds, the first time left out. timer: default is the wall clock, the device waited
    for.
    """
    seconds, timer = [], timer or functools.partial(clock, device)
    for _ in range(rounds):
        start = timer()
        work()
        seconds.append(timer() - start)
    return min(seconds[1:])


def the_memory(goals: Goals, folder: Path, _: object = None) -> None:
    """Point 7: memory of the host while features of several shards are opened, verified and sent to
    the device, pages of mapped files included.

    In a process of its own, whose peak is nothing else's.
    """
    del folder
    shards = 16 if cuda(goals) else 4
    code = f"import gpu; gpu.resident({shards}, {goals.device.type!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True,
                          stdout=subprocess.PIPE, text=True)
    grown, stored = json.loads(done.stdout)
    goals.add("7", "the host's memory for features / their bytes", grown / stored,
              0.3 if cuda(goals) else 1.3, at_most=True, on_cpu=True, stored_mb=stored >> 20)


def resident(shards: int, device: str) -> None:
    """Prints the bytes of its own memory that a process took for features on the device, and
    theirs.
    """
    rows, shape = 256, (1, 64, 32, 32)
    with tempfile.TemporaryDirectory() as name:
        store = FeatureStore(LocalFileSystem(), name)
        recipe = FeatureRecipe("t", "d", "none", 32, 1, "none", 0, "float16", rows)
        for index in range(shards):
            store.write_shard(recipe, index, torch.rand(rows, *shape), np.zeros(rows, int),
                              [str(row) for row in range(rows)], seconds=0)
        manifest = store.commit(
            recipe, [store.find_shard(recipe.key, index) for index in range(shards)], shape)
        torch.zeros(1, device=device)
        before = own_bytes()
        peak, there = [before], []
        done = []

        def watch() -> None:
            while not done:
                peak.append(own_bytes())
                time.sleep(0.002)

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            watching = pool.submit(watch)
            features = store.open(manifest)
            there.append(features.to(torch.device(device)))
            if device == "cuda":
                torch.cuda.synchronize()
            done.append(True)
            watching.result()
        print(json.dumps([max(peak) - before, features.nbytes]))


def own_bytes() -> int:
    """Memory of this process, pages of mapped files included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("/proc/self/status has no VmRSS")


def the_main_job(goals: Goals, folder: Path, cifar10: Path | None) -> None:
    """Point 5: the main job of the README at full length, in this process."""
    config = preset("split-cifar10")
    small = not cuda(goals)
    data = cifar10 or made_images(folder / "cifar", 400 if small else 50_000)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, data=str(data), class_order="given",
                                 images_per_class=40 if small else None),
        backbone=dataclasses.replace(config.backbone, freeze_depth=2, trunk_precision="bfloat16",
                                     trunk_epochs=1 if small else 30),
        hypernet=dataclasses.replace(config.hypernet, fresh_columns=32),
        train=dataclasses.replace(config.train, precision="bfloat16",
                                  epochs=1 if small else config.train.epochs))
    started, before = time.perf_counter(), time.process_time()
    run = StreamRun(config, folder / "main", goals.device)
    for _ in run.records():
        pass
    seconds, spent = time.perf_counter() - started, time.process_time() - before
    acc = run.fields()["acc"]
    laps = {f"{name}_s": round(value, 1) for name, value in run.clock.laps.items()}
    goals.add("5", "the main job at full length, seconds", seconds, MAIN_SECONDS, at_most=True,
              **laps)
    goals.add("5", "its processor time / its wall time", spent / seconds, 3, at_most=True)
    if cifar10:
        goals.add("5", "its accuracy", acc, MAIN_ACCURACY - 0.005)
    else:
        goals.open("5", "its accuracy", "needs --cifar10")
    the_answers(goals, folder / "model", run, "")
    few = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, images_per_class=100 if cuda(goals) else 40),
        backbone=dataclasses.replace(config.backbone, trunk_epochs=1, trunk_arithmetic="bfloat16"),
        features=dataclasses.replace(config.features, views=1, feature_dtype="int8"),
        train=dataclasses.replace(config.train, epochs=2))
    run = StreamRun(few, folder / "few", goals.device)
    for _ in run.records():
        pass
    the_answers(goals, folder / "few-model", run, ", int8 and bfloat16")


def made_images(folder: Path, count: int) -> Path:
    """JPEGs of noise in Parquet, as CIFAR-10 has them."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for split, images in (("train", count), ("test", count // 5)):
        encoded = []
        for pixels in rng.integers(0, 256, (images, 32, 32, 3), dtype=np.uint8):
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
            encoded.append({"bytes": buffer.getvalue(), "path": ""})
        pq.write_table(pa.table({"image": encoded, "label": np.arange(images) % 10}),
                       folder / f"{split}-00000-of-00001.parquet", row_group_size=1000)
    return folder


def the_answers(goals: Goals, folder: Path, run: StreamRun, kind: str) -> None:
    """Point 6: the same answers on a GPU and on a CPU, and images a second of both.

    folder: where the model is kept. kind: what the row says of it.
    """
    run.model().save(folder)
    images = run.experiences[0].test.read()[:256 if cuda(goals) else 64]
    answers, rates = {}, {}
    for device in dict.fromkeys(("cpu", goals.device.type)):
        predictor = Predictor.load(folder, device)
        work = functools.partial(predictor.predict, images, predictor.tasks[0])
        answers[device] = work().probabilities_BK
        rates[device] = len(images) / best_of(work, torch.device(device))
    apart = float(np.abs(answers["cpu"] - answers[goals.device.type]).max())
    goals.add("6", f"largest difference of a probability, GPU and CPU{kind}", apart, 1e-3,
              at_most=True)
    goals.add("6", f"images a second, GPU / CPU{kind}", rates[goals.device.type] / rates["cpu"],
              1.0, gpu=round(rates[goals.device.type]), cpu=round(rates["cpu"]))


PARTS = (the_step, at_once, the_trunk, the_features, the_smallest_part, the_memory, the_main_job)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"),
                        default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cifar10", type=Path)
    parser.add_argument("--json", type=Path, default=Path("gpu.json"))
    parser.add_argument("--only", nargs="+", choices=[part.__name__ for part in PARTS],
                        help="parts to measure; default: all")
    options = parser.parse_args()
    goals = Goals(torch.device(options.device))
    started = time.perf_counter()
    for part in PARTS:
        if options.only and part.__name__ not in options.only:
            continue
        configure_torch(None if cuda(goals) else 1)
        with tempfile.TemporaryDirectory() as name:
            try:
                part(goals, Path(name), options.cifar10)
            except Exception as error:  # the other goals are still measured
                traceback.print_exc()
                goals.open("", part.__name__, f"FAILED: {type(error).__name__}: {error}")
    goals.open("7", "the CPU and the GPU learn the same", "tests/unit/test_gpu.py, below")
    goals.open("8", "Ray on a GPU", "needs Ray: tests/ray/test_gpus.py")
    device = torch.cuda.get_device_name() if cuda(goals) else platform.processor()
    options.json.write_text(json.dumps({
        "device": device, "cores": os.cpu_count(), "torch": torch.__version__,
        "seconds": round(time.perf_counter() - started, 1),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20, 2),
        "goals": goals.rows}, indent=1))
    print(f"{time.perf_counter() - started:.0f} s; written to {options.json}")


if __name__ == "__main__":
    main()
