"""Requests per second and tail latency of `partialhn serve`, against a plain network in it.

    python tests/bench/serving.py --json serving.json [--seconds 8] [--clients 16]

A server on this machine answers a bounded number of requests from clients on the loopback
interface, each with one connection that it keeps. The network is torchvision's ResNet-18 at 64
pixels, plain (one head, no tasks) or cut at a depth with ten tasks; the weights are random, which
changes no cost. Requests of the cut ones name the ten tasks in turn, or `auto`.
"""

import argparse
import http.client
import io
import json
import os
import socket
import statistics
import threading
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from partialhn.checkpoints.model import Model, TaskInfo
from partialhn.config import BackboneConfig, ComputeConfig, Config, DataConfig
from partialhn.detector.detector import FEATURES, Detector
from partialhn.detector.expansion import Expansion, expansion_of
from partialhn.detector.statistics import TaskStatistics, packed
from partialhn.networks.backbone import build_network
from partialhn.networks.cut import CutNetwork
from partialhn.predict import Answer, Predictor
from partialhn.run import cut_network
from partialhn.strategies import STRATEGIES
from pipelines.platform.cluster import start_ray
from pipelines.serving.app import ServeOptions, bind, running

SIZE, TASKS, CLASSES, MOST = 64, 10, 10, 20_000


def config(depth: int) -> Config:
    return Config(DataConfig(input_size=SIZE), BackboneConfig("resnet18", depth),
                  compute=ComputeConfig(threads=1))


def cut_model(depth: int) -> Predictor:
    """Ten tasks on a network cut at a depth."""
    cut = cut_network(config(depth), build_network("resnet18", CLASSES))
    strategy = cut.strategy(config(depth))
    detector = Detector()
    shape_CHW = tuple(cut.trunk(torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8)).shape[1:])
    for task in range(TASKS):
        strategy.add_task(CLASSES)
        strategy.finish(task)
        detector.add_task(random_statistics(expansion_of(shape_CHW, FEATURES), task))
    infos = tuple(TaskInfo(str(task), tuple(map(str, range(CLASSES)))) for task in range(TASKS))
    return Predictor(Model(config(depth), cut.trunk, strategy.requires_grad_(False).eval(), infos,
                           inference=detector))


def random_statistics(expansion: Expansion, task: int) -> TaskStatistics:
    """Statistics of a task of random images, with a mean of its own for every class."""
    draw, width = torch.Generator().manual_seed(task), expansion.width
    mean_KD = torch.rand(CLASSES, width, generator=draw)
    y_S = torch.arange(CLASSES).repeat(2)
    sample_SD = mean_KD[y_S] + torch.randn(len(y_S), width, generator=draw) / 10
    return TaskStatistics(
        expansion.tensor(), mean_KD.half(), packed(torch.eye(width).double()),
        torch.tensor([100, 100]), sample_SD.half(), y_S, torch.empty(0, CLASSES),
        torch.tensor(1.0))


class Plain(Predictor):
    """The whole network as one model with one head: what a server without tasks runs."""

    def __init__(self) -> None:
        self.network = build_network("resnet18", CLASSES).eval().requires_grad_(False)
        strategy = STRATEGIES["separate_heads"](*_parts(4), config(4))
        strategy.add_task(CLASSES)
        infos = (TaskInfo("0", tuple(map(str, range(CLASSES)))),)
        trunk = CutNetwork.of(self.network, 4).trunk
        super().__init__(Model(config(4), trunk, strategy.eval(), infos))

    @torch.no_grad()
    def features(self, images_BCHW, exact=True):
        logits_BK = self.network(images_BCHW)
        return logits_BK[:, :, None, None]

    @torch.no_grad()
    def answers(self, z_BCHW, tasks):
        classes = self.model.tasks[0].classes
        made = []
        for p_K in z_BCHW[:, :, 0, 0].softmax(1).tolist():
            best = int(np.argmax(p_K))
            made.append(Answer("0", classes[best], p_K[best], classes, tuple(p_K)))
        return made


def _parts(depth):
    cut = cut_network(config(depth), build_network("resnet18", CLASSES))
    return cut.head, cut.start


class Source:
    """Makes the model in the server."""

    def __init__(self, depth):
        self.depth = depth

    def newest(self):
        return "1"

    def load(self):
        return (cut_model(self.depth) if self.depth is not None else Plain()), "1"


def photo(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(encoded, "JPEG")
    return encoded.getvalue()


def load(port: int, tasks: list[str], clients: int, seconds: float) -> dict:
    """Asks from so many connections for so long; at most MOST requests in all."""
    images = [photo(seed) for seed in range(20)]
    end, times, failed, lock = time.perf_counter() + seconds, [], [], threading.Lock()

    def client(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        own, wrong = [], 0
        for turn in range(MOST // clients):
            start = time.perf_counter()
            if start > end:
                break
            task = tasks[(number + turn) % len(tasks)]
            connection.request("POST", f"/predict?task={task}", images[(number + turn) % 20])
            answer = connection.getresponse()
            answer.read()
            wrong += answer.status != 200
            own.append(time.perf_counter() - start)
        connection.close()
        with lock:
            times.extend(own)
            failed.append(wrong)

    start = time.perf_counter()
    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - start
    ordered = sorted(times)
    return {"requests": len(times), "failed": sum(failed), "per_second": len(times) / took,
            "p50_ms": 1000 * statistics.median(ordered),
            "p99_ms": 1000 * ordered[int(0.99 * (len(ordered) - 1))]}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def measure(clients: int, seconds: float, rounds: int) -> dict:
    """Every model in turn, several rounds, the median round of each."""
    named = [str(task) for task in range(TASKS)]
    cases = {"plain": (None, ["0"]), "depth 3": (3, named), "depth 4": (4, named),
             "depth 3, auto": (3, ["auto"]), "depth 4, auto": (4, ["auto"])}
    port, found = free_port(), {name: [] for name in cases}
    options = ServeOptions(port=port, reload_seconds=3600)
    for _ in range(rounds):
        for name, (depth, tasks) in cases.items():
            with running(bind(Source(depth), options), options):
                load(port, tasks, clients, 2)
                found[name].append(load(port, tasks, clients, seconds))
                print(name, {key: round(value, 1) for key, value in found[name][-1].items()},
                      flush=True)
    rows = {name: sorted(all_rounds, key=lambda row: row["per_second"])[len(all_rounds) // 2]
            for name, all_rounds in found.items()}
    base = rows["plain"]
    for row in rows.values():
        row["per_second_ratio"] = row["per_second"] / base["per_second"]
        row["p99_ratio"] = row["p99_ms"] / base["p99_ms"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--seconds", type=float, default=8, help="of each measurement, at most 60")
    parser.add_argument("--clients", type=int, default=16, help="connections, at most 64")
    parser.add_argument("--rounds", type=int, default=3, help="at most 9")
    chosen = parser.parse_args()
    seconds, clients = min(chosen.seconds, 60), min(chosen.clients, 64)
    start_ray(None)
    rows = measure(clients, seconds, min(chosen.rounds, 9))
    result = {"command": f"python tests/bench/serving.py --seconds {seconds:g} --clients {clients} "
                         f"--rounds {chosen.rounds}",
              "date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count(), "network": "resnet18",
              "input_size": SIZE, "tasks": TASKS, "rows": rows}
    print(json.dumps(result, indent=1))
    if chosen.json:
        chosen.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
