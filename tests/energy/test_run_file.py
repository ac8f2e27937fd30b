"""The file `energy.json`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lightning_estdgm.energy._run_file import write_run_file


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "energy.json").read_text())


def test_it_is_replaced_in_one_move(tmp_path: Path) -> None:
    write_run_file(tmp_path, {"a": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_run_file(tmp_path, {"a": object()})
    assert read(tmp_path) == {"a": 1}
    assert os.listdir(tmp_path) == ["energy.json"]
