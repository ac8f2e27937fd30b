"""Triton kernels against the oracle, in Triton's interpreter: a process of its own, which is told so from the start."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import triton_installed

TESTS = Path(__file__).parent


@pytest.mark.skipif(not triton_installed.is_installed(), reason=triton_installed.REASON)
@pytest.mark.parametrize(
    ("what", "at_least"),
    [
        (["test_conformance_linear.py", "../test_linear.py", "-k", "triton"], 42),  # as of every other backend
        (["../test_derivatives.py", "-k", "triton"], 12),
        (["triton_in_interpreter.py"], 50),
        (["triton_conv_in_interpreter.py"], 48),
        (["triton_units_in_interpreter.py"], 59),
    ],
    ids=["conformance", "derivatives", "kernels", "convolutions", "units"],
)
def test_kernels_equal_the_reference_in_the_interpreter(what, at_least, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts=", *what],
        cwd=TESTS,
        env={**os.environ, "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-2_000:]
    assert int(passed[1]) >= at_least, done.stdout[-2_000:]
