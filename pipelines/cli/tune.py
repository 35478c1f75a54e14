"""The command `partialhn tune`, which searches for the best freeze depth."""

import dataclasses
import shlex
from typing import Any

from partialhn.config import Config, Sections
from partialhn.numbers import in_points, percent, percent_with_interval, size
from pipelines.cli.next_steps import next_steps
from pipelines.search.settings import SearchConfig


@dataclasses.dataclass(frozen=True)
class Tune(Sections):
    """Search freeze depths and hyperparameters on your stream, and get a recommendation.

    Stored features make a trial cheap: no image is decoded, several trials run at once, and clearly
    worse ones stop early. The search compares trials on held-out images. It writes advice.json, an
    interactive advice.html, and a configuration for each depth for `partialhn train --config`.

    --config FILE and --preset NAME give the first values, as for train; the options of data,
    network and training below apply to all trials. The same command, or the name of the search
    alone (resume), resumes a search that was stopped; finished trials are not run again.
    """

    search: SearchConfig = dataclasses.field(default_factory=SearchConfig)

    def run(self) -> None:
        from pipelines.tune.run import tune

        config = Config.of(self)
        config = dataclasses.replace(config, train=config.train.alone())
        advice = tune(config, self.search)
        if "recommendation" in advice:
            print()
            print("\n".join(summary(advice, self.search.output)))
        print("\n".join(next_commands(advice, self.search)))


def next_commands(advice: dict[str, Any], search: SearchConfig) -> list[str]:
    """Commands that a user may want to run after a search, or after a forecast."""
    if "recommendation" not in advice:
        return ["next: the same command without --forecast-only, which runs the trials"]
    file = f"{search.output}/{advice['recommendation']['config_file']}"
    return next_steps((f"train --config {shlex.quote(file)} --name STREAM",
                       f"tune --resume {search.resume or search.name} --budget 30min"),
                      search.storage, search.tracking_uri)


def summary(advice: dict[str, Any], output: str) -> list[str]:
    """The recommendation and the table of depths as lines for a terminal."""
    from pipelines.advice.page import interval_of, price

    chosen = advice["recommendation"]
    said = (chosen["reason"], chosen["preferred"], chosen["confidence"], chosen["separate_heads"],
            chosen["ridge"], advice["more_search"]["words"])
    lines = [f"freeze depth {chosen['depth']} ({chosen['freeze']})", "", *filter(None, said), "",
             "depth  trials  accuracy                 test     seconds   features  "
             "behind separate heads   ridge"]
    for row in advice["depths"]:
        accuracy, test = row["accuracy"], row["test_accuracy"]
        tested = percent(test["mean"] if test else None)
        behind = row["behind_separate_heads"]
        lines.append(
            f"{row['depth']:>5}  {sum(row['counts'].values()):>6}  "
            f"{percent_with_interval(accuracy['mean'], accuracy['low'], accuracy['high']):<22} "
            f"{tested:>7}  {row['seconds']:>8.1f}  {size(row['feature_bytes']):>9}  "
            f"{in_points(behind['mean']) if behind else '–':>21}  {percent(row['ridge']):>6}")
    lines.append(f"Guessing is right for {percent(advice['chance'])}. {interval_of(advice)}.")
    if advice["money"]:
        lines += ["", "a year" + " " * 46 + "a retraining    a year"]
        lines += [f"  {row['way']:<50}{price(row['retraining']):>12}{price(row['a_year']):>10}"
                  for row in advice["money"]["rows"]]
    return [*lines, "", f"advice: {output}/advice.html, {output}/advice.json"]


COMMANDS: dict[str, Any] = {"tune": Tune}
