"""`make audit`: licences and known vulnerabilities of everything that is installed or locked.

    exit 0  all licences are allowed, and every requirement was looked up and has no known hole
    exit 1  a licence that is not allowed, or a known vulnerability
    exit 4  something could not be checked here (no network, or an index without advisories)

What is allowed stands in pyproject.toml under [tool.partialhn-audit].
"""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
UNCHECKED = 4


def main() -> int:
    rules = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["partialhn-audit"]
    problems = licence_problems(_licences(), rules["licences"], rules["exceptions"])
    print("\n".join(f"licence: {problem}" for problem in problems) or "licences: all allowed")
    report = _advisories()
    if report is None:
        return 1 if problems else UNCHECKED
    holes, unchecked, checked = read_advisories(report)
    if checked:
        print("\n".join(f"vulnerable: {hole}" for hole in holes)
              or f"vulnerabilities: none known in {checked} requirements")
    if unchecked:
        print(f"NOT CHECKED: the advisories of {len(unchecked)} requirements could not be looked "
              f"up here, the first: {unchecked[0]}. This is no all-clear; run make audit where "
              "the package index can be reached.")
    return 1 if problems or holes else UNCHECKED if unchecked else 0


def licence_problems(found: list[dict[str, str]], allowed: list[str],
                     exceptions: dict[str, str]) -> list[str]:
    """Packages with a licence of which no part, or not every part, is allowed.

    Of "A OR B" one is enough; of "A AND B", "A; B" every part must be allowed.
    """
    problems = []
    for package in found:
        name, licence = package["Name"], package["License"]
        choices = [re.split(r" AND |; ", choice) for choice in licence.split(" OR ")]
        if name in exceptions or any(all(part in allowed or part.strip("() ") in allowed
                                         for part in choice) for choice in choices):
            continue
        problems.append(f"{name} {package['Version']} has {licence!r}; allowed: those in "
                        "pyproject.toml, or an exception there with its reason")
    here = {package["Name"] for package in found}
    return problems + [f"exception for {name}, which is not installed; take it away"
                       for name in sorted(exceptions) if name not in here]


def read_advisories(report: dict) -> tuple[list[str], list[str], int]:
    """(known holes, what could not be looked up, how many were looked up) of pip-audit's JSON."""
    holes, unchecked, checked = [], [], 0
    for package in report["dependencies"]:
        if "skip_reason" in package:
            unchecked.append(package["skip_reason"])
            continue
        checked += 1
        holes += [f"{package['name']} {package['version']}: {hole['id']}, fixed in "
                  + (", ".join(hole["fix_versions"]) or "no version yet")
                  for hole in package["vulns"]]
    return holes, unchecked, checked


def _licences() -> list[dict[str, str]]:
    done = subprocess.run([Path(sys.executable).with_name("pip-licenses"), "--format=json",
                           "--from=mixed"], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def _advisories() -> dict | None:
    done = subprocess.run(
        [Path(sys.executable).with_name("pip-audit"), "--requirement", ROOT / "requirements.lock",
         "--no-deps", "--disable-pip", "--format=json", "--progress-spinner=off"],
        capture_output=True, text=True, check=False)
    try:
        return json.loads(done.stdout)
    except ValueError:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        print(f"NOT CHECKED: pip-audit gave no report: {reason}")
        return None


if __name__ == "__main__":
    sys.exit(main())
