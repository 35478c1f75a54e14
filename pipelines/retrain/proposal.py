"""A proposal: a folder in the inbox for a task that seems to be new.

    <root>/inbox/new-task-2026-11-27/_PROPOSED.json

It holds a note and no image, and it has no `_READY` marker, so nothing is learned from it. A person
puts labelled images into it, names it as the task, and writes the marker.
"""

import json
import time
from typing import Any

from pipelines.platform.storage import Storage
from pipelines.retrain.inbox import PROPOSED, READY
from pipelines.serving.drift import DriftReport

WHAT_TO_DO = (f"put labelled images of it into train/CLASS/ and test/CLASS/ here, give the folder "
              f"the task's name, and write {READY}; or delete the folder")


def propose(storage: Storage, stream: str, report: DriftReport) -> str | None:
    """Writes the proposal of a report in which a new task seems to be here; otherwise None.

    Returns its folder. A proposal of the stream that still waits for images is written again.
    """
    if not report.new_task:
        return None
    folder = _waiting(storage, stream) or _free(storage)
    note = {"proposed": True, "stream": stream, "model": report.model_uri,
            "images_of_no_known_task": report.unknown, "share": round(report.unknown_share, 4),
            "examples": list(report.examples), "what_to_do": WHAT_TO_DO,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    storage.write_text(f"{folder}/{PROPOSED}", json.dumps(note, indent=1))
    return folder


def _waiting(storage: Storage, stream: str) -> str | None:
    """The folder of the stream's proposal that has no image yet."""
    inbox = storage.path("inbox")
    for name in storage.folders(inbox):
        files = list(storage.list(f"{inbox}/{name}"))
        if ([file.path.rpartition("/")[2] for file in files] == [PROPOSED]
                and _note(storage, files[0].path).get("stream") == stream):
            return f"{inbox}/{name}"
    return None


def _free(storage: Storage) -> str:
    """A folder that does not exist, named by today's date."""
    inbox, day = storage.path("inbox"), time.strftime("new-task-%Y-%m-%d", time.gmtime())
    taken = set(storage.folders(inbox))
    names = [day, *(f"{day}-{number}" for number in range(2, len(taken) + 3))]
    return f"{inbox}/{next(name for name in names if name not in taken)}"


def _note(storage: Storage, path: str) -> dict[str, Any]:
    try:
        note = json.loads(storage.read_text(path))
    except ValueError:
        return {}
    return note if isinstance(note, dict) else {}
