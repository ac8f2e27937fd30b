"""Tests that touch a library, run with other versions of it: ``make versions`` prints them for docs/compatibility.md.

Each version goes into a folder of its own, in front of what is installed, so that nothing installed changes. It takes
minutes and the network, and is no part of the test suite.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Version:
    """One version to try.

    Attributes:
        packages: what pip installs, without dependencies: the library first, then what it needs in other versions too.
        tests: arguments of pytest.

    """

    packages: tuple[str, ...]
    tests: tuple[str, ...]


_MODELS = "tests/compatibility/test_models.py"
VERSIONS = (
    Version(("numpy==1.26.4",), (_MODELS, "-k", "LSTM or GAN or DLRM or PyG")),
    Version(
        ("transformers==4.48.0", "tokenizers==0.21.4", "huggingface-hub==0.36.0"),
        (_MODELS, "-k", "Hugging"),
    ),
    Version(("torch-geometric==2.6.0",), (_MODELS, "-k", "PyG and not hetero")),
)


def run(version: Version) -> str:
    """Install one version beside the others, run its tests, and return pytest's last line."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
        subprocess.run([*pip, *version.packages], check=True)
        path = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
        pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *version.tests]
        done = subprocess.run(
            pytest, cwd=_ROOT, env=os.environ | {"PYTHONPATH": path}, text=True, stdout=subprocess.PIPE
        )
    if done.returncode:
        print(done.stdout, file=sys.stderr)
    return done.stdout.strip().splitlines()[-1].strip("= ")


if __name__ == "__main__":
    print("| version | outcome |\n|---|---|")
    for version in VERSIONS:
        print(f"| {version.packages[0].replace('==', ' ')} | {run(version)} |", flush=True)
