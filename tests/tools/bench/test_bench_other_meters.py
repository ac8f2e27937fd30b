"""`estdgm bench energy --against`: refused clearly where it cannot be, samples integrated, nvidia-smi read."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lightning_estdgm.cli import app
from lightning_estdgm.tools.bench._energy import EnergyBenchConfig
from lightning_estdgm.tools.bench._other_meters import _NvidiaSmi, integrate_samples, measure_against

SMALL = EnergyBenchConfig(width=32, layers=1, batch_size=2, context=16, steps=10, pairs=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_comparison_without_a_gpu_is_refused() -> None:
    with pytest.raises(RuntimeError, match="needs an NVIDIA GPU; torch sees none here"):
        measure_against(1.0, SMALL)
    result = CliRunner().invoke(app, ["bench", "energy", "--against"])
    assert result.exit_code == 1
    assert "needs an NVIDIA GPU" in result.output


def test_samples_are_integrated_between_the_ends() -> None:
    samples = [(0.0, 999.0), (1.0, 100.0), (2.0, 200.0), (4.0, 100.0), (9.0, 999.0)]
    assert integrate_samples(samples, 0.5, 5.0) == 0.5 * 100 + 150 + 300 + 1.0 * 100
    assert integrate_samples(samples, 5.0, 8.0) is None


def test_nvidia_smi_is_read_line_by_line_and_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\nprintf "[N/A]\\n 61.5\\n 62.5\\n"\nexec sleep 600\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with _NvidiaSmi("GPU-1") as smi:
        deadline = time.monotonic() + 60
        while len(smi.samples) < 2 and time.monotonic() < deadline:
            time.sleep(0.005)
    assert [watts for _, watts in smi.samples] == [61.5, 62.5]
    assert (tmp_path / "asked").read_text().split()[:3] == ["-i", "GPU-1", "--query-gpu=power.draw"]
    assert smi._process.returncode is not None
