"""The command `partialhn retrain`. Imports nothing heavy, so that `--help` is fast."""

import dataclasses
import json
import re
import sys
import time
import traceback
from typing import Any

from partialhn.errors import InputError, IntegrityError
from pipelines.cli.next_steps import next_steps
from pipelines.platform.importing import importing
from pipelines.retrain.outcome import PassOutcome
from pipelines.settings import RetrainConfig


@dataclasses.dataclass(frozen=True)
class Retrain:
    """Learn the tasks in the inbox; the gate decides which of the new versions become champion.

    Runs one pass. It may be started again at any time, also while another pass runs. Exit codes:
    0 done or nothing to do, 1 failed, 2 bad input, 3 the gate stopped a version.
    """

    retrain: RetrainConfig = dataclasses.field(default_factory=RetrainConfig)
    watch: bool = False
    """Run a pass every --interval, until the process is stopped. An error of the first pass ends
    it, because the options may be at fault; later errors are printed, and the next pass tries
    again."""
    interval: str = "10m"
    """Time between two passes with --watch: 30s, 10m, 2h."""
    json: bool = False
    """Print one line of JSON for each pass, and progress on stderr; `error` says what ended it."""

    def run(self) -> int:
        seconds = parse_interval(self.interval)
        code = self._pass()
        while self.watch:
            now = time.strftime("%H:%M:%S")
            _to_stderr(f"{now} the pass has ended; the next one begins in {self.interval}")
            time.sleep(seconds)
            try:
                code = self._pass()
            except (InputError, IntegrityError) as error:
                _to_stderr(f"error: {error}")
            except BrokenPipeError:  # nobody reads what is printed
                raise
            except Exception:
                traceback.print_exc()
        return code

    def _pass(self) -> int:
        """One pass; prints what it did, also before an error that ended it."""
        with importing("pipelines.retrain.run"):
            from pipelines.retrain.run import retrain

        done = PassOutcome(self.retrain.name, self.retrain.dry_run)
        try:
            retrain(self.retrain, _to_stderr if self.json else print, done)
        except Exception as error:
            done.error = str(error) or type(error).__name__
            self._print(done, 2 if isinstance(error, InputError) else 1)
            raise
        self._print(done, done.exit_code)
        return done.exit_code

    def _print(self, done: PassOutcome, code: int) -> None:
        if self.json:
            print(json.dumps(done.fields() | {"exit_code": code}))
        elif done.error:
            print("".join(f"{line}\n" for line in done.lines()), end="")
        else:
            print("\n".join(done.lines()))
            if (done.learned or done.adopted) and not self.watch:
                commands = [f"{command} --name {done.stream}" for command in
                            ("models list", "report", "show")]
                if done.stopped:
                    commands.append(f"models promote --name {done.stream} --force --why REASON")
                print("\n".join(next_steps(commands, self.retrain.storage,
                                           self.retrain.tracking_uri)))


def parse_interval(text: str) -> float:
    """Seconds of an interval such as 30s, 10m or 2h. Raises: InputError for another form."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if not match or float(match[1]) <= 0:
        raise InputError(f"interval is {text!r}; allowed: a number with s, m or h, such as 10m")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr)


COMMANDS: dict[str, Any] = {"retrain": Retrain}
