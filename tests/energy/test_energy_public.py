"""The public names of `lightning_estdgm.energy`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import lightning_estdgm
from lightning_estdgm import energy

_LOADS_NEITHER = """
import sys, types

root = types.ModuleType("lightning_estdgm")  # the package's own face may load more
root.__path__ = [sys.argv[1]]
sys.modules["lightning_estdgm"] = root
import lightning_estdgm.energy as energy

assert "lightning_estdgm.energy._energy_meter" not in sys.modules
for name in energy.__all__:
    assert name in dir(energy)
    getattr(energy, name)
for source in energy.discover():
    assert not isinstance(source[1], energy.SourceUnavailable), source
vendors = {"torch", "lightning", "pynvml", "amdsmi"} & set(sys.modules)
assert not vendors, vendors
"""


def test_names() -> None:
    assert energy.__all__ == [
        "CpuEstimate",
        "DeviceId",
        "DeviceInfo",
        "EnergyMeter",
        "EnergySource",
        "Footprint",
        "Reading",
        "SourceUnavailable",
        "Status",
        "discover",
        "hostname",
    ]
    assert energy.EnergyMeter is lightning_estdgm.EnergyMeter
    with pytest.raises(AttributeError, match=r"module 'lightning_estdgm\.energy' has no attribute 'Energymeter'"):
        _ = energy.Energymeter  # type: ignore[attr-defined]


def test_importing_them_loads_neither_torch_nor_lightning_nor_a_vendors_library() -> None:
    folder = str(Path(lightning_estdgm.__file__).parent)
    command = [sys.executable, "-c", _LOADS_NEITHER, folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
