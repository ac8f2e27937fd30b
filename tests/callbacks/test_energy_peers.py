"""Zeus 0.16.0 and CodeCarbon 3.3.2 beside this package, on the same GPUs, in one process.

Where the counters are sound all three give the same joules. Each difference has its test here, and its line in
docs/guides/energy.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pynvml
import pytest

needs_zeus_on_nvml = pytest.mark.skipif(
    not hasattr(pynvml, "nvmlDeviceGetC2cModeInfoV"),
    reason="Zeus 0.16.0 itself fails with nvidia-ml-py 12.535: it calls nvmlDeviceGetC2cModeInfoV, which is not there",
)
Found = dict[str, dict[str, float | str | None]]

CODECARBON_KWH = 1e-6
"""Relative error of CodeCarbon's rounded constant for joules in a kilowatt-hour (8e-7)."""


@pytest.fixture(scope="module")
def found(nvml_folder: Path, rocm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("peers")
    for name in ("machine.txt", "amd.txt"):
        (folder / name).write_text("init 0\n")
    # CodeCarbon looks for GPUs only where this command answers.
    (folder / "nvidia-smi").write_text("#!/bin/sh\nexit 0\n")
    (folder / "nvidia-smi").chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if "VISIBLE_DEVICES" not in name}
    environment |= {
        "FAKE_NVML": str(folder / "machine.txt"),
        "FAKE_AMD": str(folder / "amd.txt"),
        "ROCM_PATH": str(rocm_folder),
        "LD_LIBRARY_PATH": str(nvml_folder),
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(folder),  # where CodeCarbon looks for a configuration
    }
    job = Path(__file__).parents[1] / "helpers" / "peers_job.py"
    done = subprocess.run(
        [sys.executable, str(job)], env=environment, cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@needs_zeus_on_nvml
@pytest.mark.parametrize(("scenario", "joules"), [("counters", 1000.0), ("by_index", 876.544)])
def test_the_same_joules(found: Found, scenario: str, joules: float) -> None:
    """123.456 J on one GPU and 876.544 J on the other; then with CUDA_VISIBLE_DEVICES=1 the second alone."""
    assert found[scenario]["ours"] == joules
    assert found[scenario]["zeus"] == pytest.approx(joules, rel=1e-12)  # a sum of floats
    assert found[scenario]["codecarbon"] == pytest.approx(joules, rel=CODECARBON_KWH)


def test_codecarbon_multiplies_the_pue_into_joules(found: Found) -> None:
    assert found["counters"]["codecarbon, PUE 1.5"] == pytest.approx(1500.0, rel=CODECARBON_KWH)


@needs_zeus_on_nvml
def test_a_counter_that_was_reset_is_a_gap_here_and_negative_joules_in_zeus(found: Found) -> None:
    """One GPU's counter fell from 5000 J to 1 J; the other one used 2 J."""
    assert found["reset"]["ours"] == 2.0
    assert found["reset"]["zeus"] == 1 - 5000 + 2
    codecarbon = found["reset"]["codecarbon"]
    assert isinstance(codecarbon, float)
    assert codecarbon > 2.0  # it puts power times time in place of the reset counter


@needs_zeus_on_nvml
def test_a_counter_that_cannot_be_read_gives_no_joules_here(found: Found) -> None:
    assert found["failing"]["ours"] is None
    assert found["failing"]["zeus"] == "ZeusGPUUnknownError"  # it raises, into the training loop
    codecarbon = found["failing"]["codecarbon"]
    assert isinstance(codecarbon, float)
    assert codecarbon > 0  # power times time again


def test_a_gpu_chosen_by_uuid_is_found_here_and_not_in_zeus_or_codecarbon(found: Found) -> None:
    assert found["by_uuid"]["ours"] == 876.544
    assert found["by_uuid"]["zeus"] == "ValueError"
    assert found["by_uuid"]["codecarbon"] == 0.0


def test_amd_units_are_2_to_the_minus_16_j_here_and_a_rounded_15_3_uj_in_zeus(found: Found) -> None:
    ours, zeus = found["amd"]["ours"], found["amd"]["zeus"]
    assert ours == pytest.approx(10**8 / 2**16, abs=2e-6)
    assert zeus == pytest.approx(1530, rel=1e-5)  # 0.27 % more
