"""The tests that train, once for each kind of processor that this one can act as.

    python tests/isa.py [JOBS]

PyTorch and oneDNN choose their kernels by the processor, and sums in another order end in other
weights. Two environment variables restrict them to older instruction sets. A test that fails here
asserts what a short training on this machine happened to reach. Prints a table; the exit code is
1 where a test failed.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

SETTINGS = [("default", "SSE41", 1), ("avx2", "AVX2", 1), ("default", "AVX2", 2),
            ("avx2", "SSE41", 2)]
"""ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA and threads: each value twice."""


def run(aten: str, onednn: str, threads: int, jobs: int) -> tuple[bool, str]:
    """Runs the tests; returns whether all passed, and pytest's closing line or its output."""
    environment = os.environ | {
        "ATEN_CPU_CAPABILITY": aten, "ONEDNN_MAX_CPU_ISA": onednn,
        "OMP_NUM_THREADS": str(threads), "PARTIALHN_TEST_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "trains and not slow and not gpu", "-n",
         str(max(1, jobs // threads)),  # threads that wait for each other want cores of their own
         "--dist", "loadscope", "--no-loadscope-reorder", "-p", "no:cacheprovider", "tests/unit"],
        env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True,
        check=False)
    closing = re.findall(r"\d+ (?:passed|failed).* in .*", done.stdout)
    if done.returncode or not closing:
        return False, done.stdout + done.stderr
    return True, closing[-1].strip("= ")


def main(jobs: int) -> int:
    print(f"{'ATEN_CPU_CAPABILITY':20} {'ONEDNN_MAX_CPU_ISA':19} threads  seconds  tests",
          flush=True)
    failed = 0
    for aten, onednn, threads in SETTINGS:
        start = time.monotonic()
        passed, text = run(aten, onednn, threads, jobs)
        failed += not passed
        print(f"{aten:20} {onednn:19} {threads:7}  {time.monotonic() - start:7.0f}  "
              f"{text if passed else 'FAILED'}", flush=True)
        if not passed:
            print(text)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(int((sys.argv[1:] or ["2"])[0])))
