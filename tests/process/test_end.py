"""How the program ends: with its code and all its output, and without taking Python apart."""

import subprocess
import sys

import pytest

PROGRAM = """
import atexit, sys

class Global:
    def __del__(self):
        print("taken apart", file=sys.stderr, flush=True)

    def __call__(self, *words):
        atexit.register(print, "called at the end")
        print("x" * 100_000, end="")  # more than one buffer holds, and no end of a line
        {ending}

import pipelines.cli.main
pipelines.cli.main.run = kept = Global()
kept.circle = kept
sys.argv = ["partialhn"]
from pipelines.cli.entry import main
main()
"""


def program(ending):
    return subprocess.run([sys.executable, "-c", PROGRAM.format(ending=ending)],
                          capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize("code", [0, 1, 3])
def test_a_command_that_returns_leaves_with_its_code_and_output(code):
    done = program(f"return {code}")
    assert (done.returncode, done.stderr) == (code, "")  # nothing was taken apart
    assert done.stdout == "x" * 100_000 + "called at the end\n"


def test_a_command_that_raises_ends_as_python_ends_it():
    done = program("raise ValueError('by chance')")
    assert done.returncode == 1
    assert done.stdout.endswith("called at the end\n")
    assert "ValueError: by chance" in done.stderr
    assert "taken apart" in done.stderr  # so the tests above can fail


def test_a_reader_that_has_gone_gets_no_traceback():
    command = (f"{sys.executable} -c 'from pipelines.cli.entry import main; main()' --help"
               " | head -c 1; echo ${PIPESTATUS[0]}")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=100)
    assert "Traceback" not in done.stderr
