"""The file `energy.json`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lightning_estdgm.energy import _run_file
from lightning_estdgm.energy._run_file import write_run_file


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "energy.json").read_text())


def test_it_is_replaced_in_one_move(tmp_path: Path) -> None:
    write_run_file(tmp_path, {"a": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_run_file(tmp_path, {"a": object()})
    assert read(tmp_path) == {"a": 1}
    assert os.listdir(tmp_path) == ["energy.json"]


def test_numbers_that_json_has_no_word_for_are_null(tmp_path: Path) -> None:
    nan, inf = float("nan"), float("inf")
    method = {"last_loss": nan, "bounds": [(-inf, 0.5), [inf]], "by_rate": {0.1: nan, 0.2: 1.5}, inf: 2}
    path = write_run_file(tmp_path, {"method": method, "energy": {"steps": 3}})

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    content = json.loads(Path(path).read_text(), parse_constant=refuse)
    read_back = {"last_loss": None, "bounds": [[None, 0.5], [None]], "by_rate": {"0.1": None, "0.2": 1.5}, "null": 2}
    assert content == {"method": read_back, "energy": {"steps": 3}}


def of_run(*fits: tuple[str, int], status: str = "finished") -> dict[str, Any]:
    """The content of a run's file, as far as its owner is told by it."""
    return {"status": status, "run": {"fits": [{"id": fit, "steps": steps} for fit, steps in fits]}}


def written(folder: Path) -> dict[str, Any]:
    return {path.name: json.loads(path.read_text()) for path in sorted(folder.iterdir())}


def test_the_files_of_other_runs_stay(tmp_path: Path) -> None:
    runs = [of_run(("a", 8)), of_run(("b", 8)), of_run(("c", 8))]
    names = [write_run_file(tmp_path, run).name for run in runs]
    assert names == ["energy.json", "energy-1.json", "energy-2.json"]
    assert written(tmp_path) == dict(zip(names, runs, strict=True))
    assert write_run_file(tmp_path, of_run(("b", 9))).name == "energy-1.json"  # its own
    assert written(tmp_path)["energy-1.json"] == of_run(("b", 9))


@pytest.mark.parametrize(
    ("before", "after", "replaced"),
    [
        (of_run(("a", 4), status="running"), of_run(("a", 8)), True),
        (of_run(("a", 8)), of_run(("a", 8), ("b", 16)), True),  # resumed from its end
        (of_run(("a", 8)), of_run(("a", 4), ("b", 16)), False),  # branched off before its end
        (of_run(("a", 8), ("b", 16)), of_run(("a", 8), ("c", 16)), False),  # two that go on from one
        (of_run(("a", 6), status="exception"), of_run(("a", 4), ("b", 8)), True),  # resumed after a crash
        (of_run(("a", 4), ("b", 6), status="exception"), of_run(("a", 4), ("c", 8)), True),  # after a second one
        (of_run(("a", 4), status="running"), of_run(("b", 8)), False),  # killed, and begun anew
        ({"run": {"name": "of an older version"}}, of_run(("a", 8)), False),
        ({"run": {"fits": []}}, of_run(("a", 8)), False),
        (["no file of ours"], of_run(("a", 8)), False),
        (of_run(("a", 8)), {"run": {}}, False),
    ],
)
def test_a_file_is_replaced_by_the_run_that_goes_on_with_it(
    tmp_path: Path, before: Any, after: dict[str, Any], replaced: bool
) -> None:
    (tmp_path / "energy.json").write_text(json.dumps(before))
    write_run_file(tmp_path, after)
    expected = {"energy.json": after} if replaced else {"energy.json": before, "energy-1.json": after}
    assert written(tmp_path) == expected


def test_what_is_no_json_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "energy.json").write_text("{")
    assert write_run_file(tmp_path, of_run(("a", 8))).name == "energy-1.json"
    assert (tmp_path / "energy.json").read_text() == "{"


def test_a_run_that_comes_first_by_a_moment_keeps_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def too_late(source: str, target: Path) -> None:
        if target.name == "energy.json":
            target.write_text(json.dumps(of_run(("first", 1))))
        link(source, target)

    monkeypatch.setattr(_run_file.os, "link", too_late)
    assert write_run_file(tmp_path, of_run(("second", 1))).name == "energy-1.json"
    assert written(tmp_path) == {"energy.json": of_run(("first", 1)), "energy-1.json": of_run(("second", 1))}


def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(_run_file.os, "link", refused)
    assert [write_run_file(tmp_path, of_run((fit, 1))).name for fit in "aba"] == [
        "energy.json", "energy-1.json", "energy.json",
    ]  # fmt: skip
    assert len(list(tmp_path.iterdir())) == 2
