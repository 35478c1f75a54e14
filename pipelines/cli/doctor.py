"""The command `partialhn doctor`. Imports nothing heavy, so that `--help` is fast."""

import dataclasses
from typing import Any

from partialhn.config import ComputeConfig
from pipelines.settings import OutputConfig


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Check storage, registry, clocks, packages, GPUs and free space, here and on every Ray node.

    Exit code 1 if a check failed; the lines below the table say what to do about it.
    """

    storage: str = OutputConfig.storage
    """Folder or s3://bucket/prefix, as for train."""
    tracking_uri: str | None = None
    """MLflow server or database, as for train."""
    name: str | None = None
    """Check the champion of this stream, too: its files, and that its alias is that of the
    history."""
    json: bool = False
    """Print JSON for machines."""
    compute: ComputeConfig = dataclasses.field(default_factory=ComputeConfig)

    def run(self) -> int:
        import json

        from pipelines.doctor import examine, fields, lines
        from pipelines.platform.storage import open_storage

        checks = examine(open_storage(self.storage), self.tracking_uri, self.compute, self.name)
        print(json.dumps(fields(checks), indent=1) if self.json else "\n".join(lines(checks)))
        return 0 if all(check.passed for check in checks) else 1


COMMANDS: dict[str, Any] = {"doctor": Doctor}
