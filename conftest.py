"""Runs the Python examples of README.md and docs/ as tests, each file in a folder of its own; keeps no timings."""

import os
import tempfile
from pathlib import Path
from typing import Any

from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

from helpers.triton_installed import is_installed

# No test depends on what this machine has measured before, or adds to it; also in the processes that tests start.
os.environ["ESTDGM_CHOICES"] = "off"
# The processes that tests start find this package and the tests' helpers where this process does.
_PATHS = [str(Path(__file__).parent), str(Path(__file__).parent / "tests")]
os.environ["PYTHONPATH"] = os.pathsep.join([*_PATHS, *filter(None, [os.environ.get("PYTHONPATH")])])

pytest_plugins = ["helpers.browser", "helpers.vendor_libraries"]
# Programs of their own: importing them loads other meters here, or Sphinx.
collect_ignore = ["tests/helpers/peers_job.py", "docs/_site"]
if not is_installed():
    collect_ignore.append("lightning_estdgm/sparse/backends/triton")  # cannot be imported with an older Triton


def _enter_folder(namespace: dict[str, Any]) -> None:
    namespace["_folders"] = tempfile.TemporaryDirectory(), os.getcwd()
    os.chdir(namespace["_folders"][0].name)


def _leave_folder(namespace: dict[str, Any]) -> None:
    folder, before = namespace["_folders"]
    os.chdir(before)
    folder.cleanup()


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["README.md", "docs/*.md", "docs/*/*.md"],
    setup=_enter_folder,
    teardown=_leave_folder,
).pytest()
