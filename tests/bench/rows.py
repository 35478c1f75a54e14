"""What every bench writes: rows of ratios in one JSON file, and the machine they are from."""

import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch


def row(name: str, baseline: str, ratio: float, goal: float | None, *, at_least: bool = False,
        median_ms: float | None = None, baseline_ms: float | None = None,
        **more: float) -> dict:
    """One comparison; `goal` is the most the ratio may be, or the least; None: only shown."""
    made = {"name": name, "baseline": baseline, "ratio": round(ratio, 4)}
    if goal is not None:
        made |= {"goal": goal, "goal_is": "at least" if at_least else "at most",
                 "holds": ratio >= goal if at_least else ratio <= goal}
    made |= {key: round(value, 3) for key, value in (("median_ms", median_ms),
                                                     ("baseline_ms", baseline_ms)) if value}
    return made | more


def log(made: dict) -> None:
    """Prints a row as it comes."""
    times = (f"{made['median_ms']:10.2f} ms  {made['baseline_ms']:10.2f} ms  "
             if "baseline_ms" in made else " " * 28)
    goal = (f"{made['goal_is']} {made['goal']}  {'holds' if made['holds'] else 'MISSED'}"
            if "goal" in made else "no goal")
    print(f"{made['name']:36}{times}ratio {made['ratio']:8.3f}  {goal}   ({made['baseline']})",
          flush=True)


def write(path: Path | None, rows: list[dict]) -> None:
    """Puts rows into the file, in the place of those with the same names."""
    if path is None:
        return
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    names = {each["name"] for each in rows}
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(),
               "torch": torch.__version__, "python": platform.python_version(),
               "threads": torch.get_num_threads(),
               "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}
    path.write_text(json.dumps({"machine": machine, "rows": [
        *(each for each in kept if each["name"] not in names), *rows]}, indent=1))


def clock(device: torch.device) -> float:
    """Wall-clock seconds, after what the device was given is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def compare(first, second, rounds: int, steps: int,
            clock=time.process_time) -> tuple[float, float, float, float]:
    """Median milliseconds of each, the median ratio of pairs, and the spread of those ratios.

    Rounds alternate, so that a machine that slows down slows both. Milliseconds are the processor
    time of this process, unless another clock is given.
    """
    def once(step) -> float:
        start = clock()
        for _ in range(steps):
            step()
        return 1e3 * (clock() - start) / steps

    once(first), once(second)
    pairs = [(once(first), once(second)) for _ in range(rounds)]
    ratios = sorted(a / b for a, b in pairs)
    return (statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs),
            statistics.median(ratios), ratios[-1] - ratios[0])
