"""The report's last sections: how to use the model and go back, and where the numbers come from."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from partialhn.numbers import size
from pipelines.report.charts import escape
from pipelines.report.facts import Facts
from pipelines.report.html import data_table, facts_list, pair, section
from pipelines.settings import mask_password

MOST_KEYS = 300
"""Feature keys that the page lists; a stream of a thousand tasks has thousands."""


def usage(facts: Facts) -> str:
    """Commands to load the model, and to return to an earlier version."""
    uri = facts.result.get("model_uri")
    if not uri:
        return section("How to use it", "This run registered no model.")
    uri, tracking = str(uri), facts.result.get("tracking_uri")
    command = " \\\n    ".join([f"partialhn predict --model {shlex.quote(uri)}",
                                f"--task {shlex.quote(facts.tasks[0])}",
                                "--input DIR_OR_PARQUET --output preds.parquet",
                                *_place(facts)])
    python = "import mlflow, pandas\n\n"
    if tracking:
        python += f"mlflow.set_tracking_uri(\n    {mask_password(str(tracking))!r})\n"
    python += (f"model = mlflow.pyfunc.load_model(\n    {uri!r})\n"
               'image = open("photo.png", "rb").read()\n'
               "print(model.predict(pandas.DataFrame(\n"
               f"    {{\"image\": [image], \"task\": [{facts.tasks[0]!r}]}})))")
    left = ("<div><h3>Label images of a task</h3>" + _code(command)
            + "<h3>Load it in Python</h3>" + _code(python) + "</div>")
    versions = list(facts.result.get("versions") or [])
    return section("How to use it", f"The current model is {uri}. Every task registered a "
                   "version that knows the tasks up to it; any of them can be loaded.",
                   pair(left, _going_back(uri, facts, versions)),
                   _versions(versions), paper=False)


def _place(facts: Facts) -> list[str]:
    """The options that say where the stream lies, which a command needs from any other folder."""
    places = (("--storage", facts.result.get("storage")),
              ("--tracking-uri", facts.result.get("tracking_uri")))
    return [f"{option} {shlex.quote(mask_password(str(value)))}"
            for option, value in places if value]


def _going_back(uri: str, facts: Facts, versions: Sequence[Mapping[str, Any]]) -> str:
    """The command that makes the version before the current one current, for good."""
    named = re.fullmatch(r"models:/(?P<name>[^@]+)@(?P<alias>[^@/]+)", uri)
    numbers = [str(each.get("version")) for each in versions]
    champion = str(facts.result.get("champion") or (numbers or [""])[-1])
    earlier = numbers[:numbers.index(champion)] if champion in numbers else []
    if named is None or not earlier:
        return ""
    version = earlier[-1]
    words = [f"partialhn models rollback --name {shlex.quote(named['name'])}",
             f"--to {shlex.quote(version)} --why REASON", *_place(facts)]
    load = f"models:/{named['name']}/{version}"
    return ("<div><h3>An earlier version, named in place of the current one</h3>" + _code(load)
            + f"<h3>Go back: make version {escape(version)} the current one again</h3>"
            + _code(" \\\n    ".join(words)) + "</div>")


def _versions(versions: Sequence[Mapping[str, Any]]) -> str:
    if not versions:
        return ""
    rows = [[escape(row.get("version")), escape(row.get("task")),
             escape(", ".join(map(str, row.get("aliases") or ())) or "–"),
             f"<code>{escape(str(row.get('run_id') or '–')[:8])}</code>"] for row in versions]
    table = data_table(["Version", "After task", "Aliases", "Run"], rows, "wrap")
    return (f"<details{' open' if len(rows) <= 6 else ''}><summary>Registered versions "
            f"({len(rows)})</summary>"
            f'<div class="scroll">{table}</div></details>')


def _code(text: str) -> str:
    return f"<pre><code>{escape(text)}</code></pre>"


def configuration(facts: Facts) -> str:
    """Seed, versions, hashes and every option."""
    result = facts.result
    weights = result.get("weights") or {}
    libraries = ", ".join(f"{name} {version}" for name, version in
                          sorted((result.get("versions_of_libraries") or {}).items()))
    rows = [
        ("Strategy", result.get("strategy")), ("Seed", result.get("seed")),
        ("Device", result.get("device")), ("partialhn", result.get("partialhn_version")),
        ("Libraries", libraries), ("Weights hash", result.get("weights_hash")),
        ("Weights", ", ".join(f"{count:,} {kind}" for kind, count in weights.items())),
        ("Images decoded", result.get("images_decoded")),
        ("Storage", result.get("storage")), ("Tracking", result.get("tracking_uri")),
    ]
    known = [(name, mask_password(str(value))) for name, value in rows
             if value is not None and value != ""]
    return section("Configuration and provenance", "Settings that repeat the run, and hashes that "
                   "show whether it is the same.", facts_list(known), _options(result),
                   _feature_keys(result), paper=False)


def _options(result: Mapping[str, Any]) -> str:
    config = result.get("config")
    if not isinstance(config, Mapping) or not config:
        return ""
    groups = [f"<div><h3>{escape(name)}</h3>"
              + facts_list([(key, _plain(value)) for key, value in values.items()]) + "</div>"
              for name, values in config.items() if isinstance(values, Mapping)]
    return ("<details><summary>Every option</summary>"
            f'<div class="options">{"".join(groups)}</div></details>')


def _plain(value: object) -> str:
    return mask_password(value if isinstance(value, str) else json.dumps(value))


def _feature_keys(result: Mapping[str, Any]) -> str:
    keys = result.get("feature_keys") or []
    if not keys:
        return ""
    listed = "".join(f"<div><code>{escape(key)}</code></div>" for key in keys[:MOST_KEYS])
    if len(keys) > MOST_KEYS:
        listed += f"<div>and {len(keys) - MOST_KEYS} more, which result.json lists</div>"
    total = size(result.get("feature_bytes"))
    return (f"<details><summary>Feature keys ({len(keys)}, {total})</summary>"
            f'<div class="listed">{listed}</div></details>')


def terms() -> str:
    """The terms that the page uses, for a reader from another field."""
    rows = [
        ("Task", "A set of classes that arrives together and is learned together. Tasks are "
                 "numbered from 0, as in “--task 0”."),
        ("Accuracy", "Share of test images, never used in training, that get the right class."),
        ("Forgetting", "How much accuracy on an earlier task is lost while later ones are "
                       "learned, the usual failure of networks that learn step by step."),
        ("Trunk, head", "The first part of the network, frozen and shared by all tasks; and the "
                        "rest, different for every task."),
        ("Partial hypernetwork", "A small network that generates the head's weights from a short "
                                 "code of the task, so that a new task adds little more than its "
                                 "code."),
    ]
    return ("<footer><details><summary>Words used on this page</summary>"
            f"{facts_list(rows)}</details></footer>")
