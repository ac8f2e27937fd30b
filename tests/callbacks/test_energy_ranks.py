"""Several processes: each device is read once on its host, and the sums are those of all ranks."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_estdgm.callbacks._internal.energy_fit import own_devices
from lightning_estdgm.energy._reading import DeviceId, DeviceInfo

HELPERS = Path(__file__).parents[1] / "helpers"
ONCE_A_HOST = {"seen-a": 100.0, "seen-b": 200.0, "package": 30.0, "memory": 5.0}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run ranks_job.py once: every world in it is a real gloo process group."""
    out = tmp_path_factory.mktemp("worlds")
    done = subprocess.run(
        [sys.executable, str(HELPERS / "ranks_job.py"), str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return out


def of_ranks(folder: Path, ranks: int) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


def last_row(folder: Path) -> dict[str, float]:
    with (folder / "metrics.csv").open() as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    return [row for row in rows if "energy/total_joules" in row][-1]


def readers(record: Path) -> dict[tuple[str, str], set[str]]:
    """Which processes read (host, source)."""
    found: dict[tuple[str, str], set[str]] = {}
    for line in record.read_text().splitlines():
        host, name, event, pid = line.split()
        if event == "read":
            found.setdefault((host, name), set()).add(pid)
    return found


def devices(summary: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(d["host"], d["uid"]): d for source in summary["sources"] for d in source["devices"]}


def test_four_ranks_on_two_hosts_read_each_device_once(worlds: Path) -> None:
    found = readers(worlds / "four" / "reads.txt")
    for host in ("node-0", "node-1"):
        assert {name: len(found[host, name]) for name in ONCE_A_HOST} == dict.fromkeys(ONCE_A_HOST, 1)
        assert len({pid for name in ONCE_A_HOST for pid in found[host, name]}) == 1  # one rank has them all
        assert len(found[host, "own"]) == 2  # a GPU that only one rank sees is read by that rank
        assert len(found[host, "process"]) == 2
    assert not found["node-0", "seen-a"] & found["node-1", "seen-a"]


def test_four_ranks_log_the_sum_of_all(worlds: Path) -> None:
    ranks = of_ranks(worlds / "four", 4)
    summary = ranks[0]["first"]
    seen = devices(summary)
    own = [(host, f"gpu-own-{i}") for host in ("node-0", "node-1") for i in (0, 1)]
    assert len(seen) == 2 * 4 + 4 + 4
    assert {key: round(seen[key]["watts"]) for key in own} == dict.fromkeys(own, 50)
    for host in ("node-0", "node-1"):
        assert round(seen[host, "gpu-a"]["watts"]) == 100
        assert round(seen[host, "gpu-b"]["watts"]) == 200
        assert round(seen[host, "package-0"]["watts"]) == 30
        assert round(seen[host, "package-0/dram"]["watts"]) == 5
    assert sum(d["joules"] for d in seen.values()) == pytest.approx(summary["total_joules"], abs=1e-4)
    assert {rank["first"]["total_joules"] for rank in ranks} == {summary["total_joules"]}  # reduced on all ranks
    assert (summary["steps"], summary["samples"], summary["gaps"]) == (2, 32, 0)

    last = last_row(worlds / "four" / "first")
    assert last["energy/total_joules"] == pytest.approx(summary["total_joules"], abs=1e-4)
    places = {name.split("_")[0] for name in last if name.startswith("power/gpu/")}
    assert places == {f"power/gpu/{node}/{local}" for node in (0, 1) for local in range(4)}
    assert last["power/gpu_watts"] == pytest.approx(2 * 300 + 4 * 50, rel=0.01)
    assert last["power/total_watts"] == pytest.approx(2 * 300 + 4 * 50 + 2 * 35 + 4 * 1, rel=0.01)


def test_only_rank_0_writes_and_the_file_names_all_ranks(worlds: Path) -> None:
    content = json.loads((worlds / "four" / "first" / "energy.json").read_text())
    assert content["status"] == "finished"
    assert (content["run"]["world_size"], content["run"]["hosts"]) == (4, 2)
    assert content["run"]["devices"] == ["cpu"] * 4
    assert (content["run"]["host"], content["run"]["strategy"]) == ("node-0", "DDPStrategy")
    assert content["energy"] == of_ranks(worlds / "four", 4)[0]["first"]


def test_a_restart_of_four_ranks_adds_up(worlds: Path) -> None:
    first, second = (of_ranks(worlds / "four", 4)[0][name] for name in ("first", "second"))
    before, after = devices(first), devices(second)
    assert set(after) == set(before) | {("node-0", "gpu-other"), ("node-1", "gpu-other")}
    for key, device in before.items():
        assert after[key]["joules"] == device["joules"]  # taken over once, though every rank restored it
    fresh = sum(d["joules"] for key, d in after.items() if key not in before)
    assert second["total_joules"] == pytest.approx(first["total_joules"] + fresh, abs=1e-4)
    assert fresh > 0
    assert (second["steps"], second["samples"]) == (4, 64)
    assert of_ranks(worlds / "four", 4)[0]["state"] == {"sample": 32}


def test_ranks_that_share_a_batch_count_it_once(worlds: Path) -> None:
    third = of_ranks(worlds / "four", 4)[0]["third"]
    assert (third["steps"], third["samples"]) == (4, 32)  # two replicas of two ranks each


def test_two_ranks_on_one_gpu_count_it_once(worlds: Path) -> None:
    found = readers(worlds / "two" / "reads.txt")
    assert {name: len(pids) for (_, name), pids in found.items()} == dict.fromkeys((*ONCE_A_HOST, "own"), 1) | {
        "process": 2
    }
    summary = of_ranks(worlds / "two", 2)[0]["fit"]
    seen = devices(summary)
    assert round(seen["node-0", "gpu-shared"]["watts"]) == 50
    assert last_row(worlds / "two" / "fit")["power/gpu_watts"] == pytest.approx(350, rel=0.01)


def test_the_idle_baseline_of_all_ranks(worlds: Path) -> None:
    summary = of_ranks(worlds / "two", 2)[0]["fit"]
    idle = {(d["host"], d["kind"]): d["watts"] for d in summary["idle"]["devices"]}
    assert len(summary["idle"]["devices"]) == 7
    assert summary["idle"]["watts"] == pytest.approx(300 + 50 + 30 + 5 + 2, rel=0.01)
    assert idle["node-0", "dram"] == pytest.approx(5, rel=0.01)
    # Constant power is idle power: nothing is left, but for the rounding of watts to milliwatts.
    assert summary["idle"]["net_joules"] == pytest.approx(0, abs=0.001 * summary["total_joules"])
    assert summary["idle"]["joules"] == pytest.approx(summary["total_joules"], rel=0.001)


def test_an_exception_in_a_group_leaves_the_file(worlds: Path) -> None:
    content = json.loads((worlds / "two" / "failing" / "energy.json").read_text())
    assert content["status"] == "exception"
    assert content["energy"] == of_ranks(worlds / "two", 2)[0]["failing"]
    assert content["energy"]["steps"] == 2
    assert content["energy"]["total_joules"] > 0


@pytest.mark.parametrize("start", ["ddp_fork", "ddp_spawn"])
def test_a_trainer_that_starts_its_own_ranks(worlds: Path, start: str) -> None:
    parent = json.loads((worlds / start / "parent.json").read_text())
    assert parent["joules"] is None
    found = readers(worlds / start / "reads.txt")
    assert str(parent["pid"]) not in {pid for pids in found.values() for pid in pids}
    assert Counter(name for _, name in found) == dict.fromkeys((*ONCE_A_HOST, "own", "process"), 1)
    assert all(len(pids) == (2 if name == "process" else 1) for (_, name), pids in found.items())
    content = json.loads((worlds / start / "fit" / "energy.json").read_text())
    assert content["status"] == "finished"
    assert (content["run"]["world_size"], content["energy"]["steps"], content["energy"]["samples"]) == (2, 4, 32)
    watts = sum(d["watts"] for d in devices(content["energy"]).values())
    assert watts == pytest.approx(300 + 50 + 35 + 2, rel=0.01)


class Cuda:
    """As much of a Trainer as the choice of devices looks at: one whose rank is on a GPU."""

    class strategy:
        root_device = torch.device("cuda", 1)


def test_a_rank_on_a_gpu_wants_that_gpu_and_what_the_host_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (DeviceId("a", "gpu", f"GPU-{i}{i}111111-2222-3333-4444-555555555555") for i in "ab")
    package = DeviceId("a", "cpu", "package-0")
    seen = {first: DeviceInfo("H100"), second: DeviceInfo("H100"), package: DeviceInfo("package")}

    def properties(uuid: str) -> Any:
        return lambda device: SimpleNamespace(uuid=uuid) if device.index == 1 else None

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties(second.uid.removeprefix("GPU-")))
    assert list(own_devices(Cuda, seen)) == [second, package]  # type: ignore[arg-type]
    # One that no source knows by its id: all that are seen, of which the lowest rank reads each.
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties("cccccccc-2222-3333-4444-555555555555"))
    assert list(own_devices(Cuda, seen)) == [first, second, package]  # type: ignore[arg-type]
