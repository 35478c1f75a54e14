"""The command `partialhn retrain`. Imports nothing heavy, so that `--help` is fast."""

import dataclasses
import json
import re
import sys
import time
from typing import Any

from partialhn.errors import InputError
from pipelines.cli.next_steps import next_steps
from pipelines.platform.importing import importing
from pipelines.settings import RetrainConfig


@dataclasses.dataclass(frozen=True)
class Retrain:
    """Learn the tasks in the inbox; the gate decides which of the new versions become champion.

    Runs one pass. It may be started again at any time, also while another pass runs. Exit codes:
    0 done or nothing to do, 1 failed, 2 bad input, 3 the gate stopped a version.
    """

    retrain: RetrainConfig = dataclasses.field(default_factory=RetrainConfig)
    watch: bool = False
    """Run a pass every --interval, until the process is stopped."""
    interval: str = "10m"
    """Time between two passes with --watch: 30s, 10m, 2h."""
    json: bool = False
    """Print one line of JSON for each pass, and progress on stderr."""

    def run(self) -> int:
        seconds = parse_interval(self.interval)
        while True:
            code = self._pass()
            if not self.watch:
                return code
            now = time.strftime("%H:%M:%S")
            _to_stderr(f"{now} the pass has ended; the next one begins in {self.interval}")
            time.sleep(seconds)

    def _pass(self) -> int:
        with importing("pipelines.retrain.run"):
            from pipelines.retrain.run import retrain

        done = retrain(self.retrain, _to_stderr if self.json else print)
        if self.json:
            print(json.dumps(done.fields()))
        else:
            print("\n".join(done.lines()))
            if (done.learned or done.adopted) and not self.watch:
                commands = [f"{command} --name {done.stream}" for command in
                            ("models list", "report", "show")]
                if done.stopped:
                    commands.append(f"models promote --name {done.stream} --force --why REASON")
                print("\n".join(next_steps(commands, self.retrain.storage,
                                           self.retrain.tracking_uri)))
        return done.exit_code


def parse_interval(text: str) -> float:
    """Seconds of an interval such as 30s, 10m or 2h. Raises: InputError for another form."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if not match or float(match[1]) <= 0:
        raise InputError(f"interval is {text!r}; allowed: a number with s, m or h, such as 10m")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr)


COMMANDS: dict[str, Any] = {"retrain": Retrain}
