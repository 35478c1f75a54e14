"""The recorded stream of a thousand tasks: what does not grow with their number."""

import json
from pathlib import Path

RECORDED = json.loads((Path(__file__).parent / "thousand.json").read_text(encoding="utf-8"))
LAST = max(RECORDED["marks"], key=int)


def test_bytes_of_a_pass_memory_of_a_server_and_the_start_of_commands_stay_within_the_goals():
    ratios = RECORDED["ratios"][LAST]
    assert RECORDED["tasks learned before each mark"][LAST] > 990
    assert ratios["pass bytes"] <= 1.3
    assert max(ratios[f"{name} processor"] for name in ("predict", "show", "models list")) <= 2
    assert ratios["serving memory"] <= 2
    assert RECORDED["marks"][LAST]["models list processor"] < 2
