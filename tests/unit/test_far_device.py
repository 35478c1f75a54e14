"""The tests of `far_device_suite.py`, in a process of their own: where PyTorch has been told of a
device more, it cannot pretend any longer that tensors are on a GPU, as `test_steps.py` asks it to.
"""

import re
import subprocess
import sys
from pathlib import Path

SUITE = Path(__file__).with_name("far_device_suite.py")


def test_whatever_learns_and_answers_does_it_there():
    done = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", SUITE],
                          cwd=SUITE.parents[2], capture_output=True, text=True, timeout=500,
                          check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    written = len(re.findall(r"^def test_", SUITE.read_text(encoding="utf-8"), re.MULTILINE))
    (passed,) = re.findall(r"(\d+) passed", done.stdout)
    assert int(passed) >= written > 5
    assert "skipped" not in done.stdout
