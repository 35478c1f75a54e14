"""Puts what a search ended with into the record of searches on real photographs.

    python tests/golden/tune.py NAME ADVICE.json

Adds `NAME` (such as tpe-2 or random-0) to tune-tiny-imagenet.json beside this file, whose `command`
and `config` say how the search was run.
"""

import collections
import json
import sys
from pathlib import Path

RECORD = Path(__file__).with_name("tune-tiny-imagenet.json")


def entry(advice: dict) -> dict:
    """What the record keeps of an advice.json."""
    trials = sorted(advice["trials"], key=lambda each: each["search_seconds"])
    search = [each for each in trials if each["kind"] == "search"]
    statuses = collections.Counter(each["status"] for each in search)
    curve, spent, best = [], 0.0, 0.0
    for each in search:
        spent += each["processor_seconds"]
        if each["status"] == "finished":
            best = max(best, each["accuracy"])
            curve.append([round(spent, 1), round(best, 4)])
    chosen = advice["recommendation"]
    return {
        "algorithm": advice["options"]["algorithm"],
        "sampler_seed": advice["options"]["sampler_seed"],
        "trials": len(search), "stopped_early": statuses["pruned"], "failed": statuses["failed"],
        "final_runs": len(trials) - len(search), "search_seconds": advice["search_seconds"],
        "processor_seconds": round(sum(each["processor_seconds"] for each in trials), 1),
        "recommended_depth": chosen["depth"], "votes": chosen["votes"],
        "reason": chosen["reason"], "confidence": chosen["confidence"],
        "depths": [{
            "depth": each["depth"], "held_out": rounded(each["accuracy"]["values"]),
            "test": rounded(each["test_accuracy"]["values"]),
            "separate_heads": rounded(each["separate_heads"]["values"]),
            "seconds": round(each["seconds"], 2), "feature_bytes": each["feature_bytes"],
            "params": each["params"]} for each in advice["depths"]],
        "best_so_far_by_processor_seconds": curve, "importance": advice["importance"],
        "forecast": advice["forecast"], "preferred": chosen["preferred"],
        "noise": round(chosen["noise"], 5)}


def rounded(values: list[float]) -> list[float]:
    return [round(value, 4) for value in values]


if __name__ == "__main__":
    name, path = sys.argv[1:]
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    record["searches"][name] = entry(json.loads(Path(path).read_text(encoding="utf-8")))
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
