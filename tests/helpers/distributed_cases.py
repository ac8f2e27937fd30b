"""What every way of sharding is held to: the runs of `sharded.train` that a job makes, and what they must equal."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.distributed_sharded import BLOCK_LAYERS, STEPS, WEIGHT_LAYERS, train

CHECKPOINTS = {"inside a window": 4, "mid-epoch": 7, "phase border": 10}
SPOILED = (3, 8)

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "single weights": {"block_size": 1},
    "cpu operators": {"block_size": 16, "backend": "cpu", "exclude": WEIGHT_LAYERS},
    "accumulation": {"accumulate": 2},
    "frozen": {"inactive": "frozen"},
    "RigL's rule": {"rule": {"update_rule": {"grow": "gradient", "regrow": True}}},
    "NaN on one rank": {"spoil": SPOILED},
}


def all_runs(strategy: str, names: tuple[str, ...], folder: Path | None = None) -> dict[str, Any]:
    """Train with each of the named settings, in one job; with a folder, also go on from the plain run's checkpoints."""
    record: dict[str, Any] = {name: train(strategy, **SETTINGS[name]) for name in names if name != "plain"}
    if "plain" in names:
        record["plain"] = train(strategy, save=folder, save_at=tuple(CHECKPOINTS.values()))
    if folder is not None:
        for when, step in CHECKPOINTS.items():
            record[when] = train(strategy, resume=folder / f"{step}.ckpt", seed=1)
    return record


@functools.cache
def on_one_device(name: str) -> dict[str, Any]:
    """The same run without any sharding, in this process."""
    return train(**SETTINGS[name])


def assert_same_masks(record: dict[str, Any], expected: dict[str, Any]) -> None:
    """Masks equal exactly, at every checkpoint and at the end; budgets too."""
    assert record["masks"].keys() == expected["masks"].keys()
    for name, mask in expected["masks"].items():
        assert torch.equal(record["masks"][name], mask), name
    assert record["decisions"] == expected["decisions"]
    assert record["steps"] == expected["steps"]


def assert_as_on_one_device(record: dict[str, Any], name: str) -> None:
    """The run came to the masks of one device exactly, and to its weights but for the order of sums."""
    expected = on_one_device(name)
    assert_same_masks(record, expected)
    for key, weight in expected["weights"].items():
        torch.testing.assert_close(record["weights"][key], weight, rtol=1e-6, atol=1e-9)
    for key, value in expected["counters"].items():
        if key != "flops_executed_ratio":  # single weights of a sharded weight have no operator
            assert record["counters"][key] == pytest.approx(value, rel=1e-9), key
    inactive = {n: ~m for n, m in expected["masks"].items() if record["decisions"][n][2] == 1}
    for layer, off in inactive.items():
        weight = record["weights"][f"{layer}.weight"]
        if SETTINGS[name].get("inactive") != "frozen":
            assert torch.count_nonzero(weight[off]) == 0, layer


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two records differ in anything, to the bit."""
    if isinstance(a, Tensor):
        same = isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
        return [] if same else [where]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [where]
        return [d for key in a for d in differences(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [where]
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{where}[{i}]")]
    return [] if a == b else [where]


RESUMED = ("masks", "weights", "optimizer", "counters", "decisions", "backends")


def assert_resumed_equals_straight(record: dict[str, Any], when: str) -> None:
    """Everything that the run comes to is the same to the bit as if it had not been stopped."""
    straight, resumed, step = record["plain"], record[when], CHECKPOINTS[when]
    assert straight["steps"][-1][0] == STEPS
    assert resumed["steps"] == straight["steps"][step:]
    for part in RESUMED:
        left, right = (dict(x[part]) if isinstance(x[part], dict) else x[part] for x in (straight, resumed))
        if part == "counters":  # of the module, which counts anew, and the one that torch makes the state by
            del left["optimizer steps"], right["optimizer steps"]
        assert differences(left, right, part) == []


def assert_holds_its_part_only(ranks: list[dict[str, Any]]) -> None:
    """Each rank's tensors are a few times its part of the weight; of blocks, one more entry a block each."""
    for name, (shape, *_) in ranks[0]["plain"]["decisions"].items():
        if name == "head":
            continue
        locals_ = [rank["plain"]["local"][name] for rank in ranks]
        whole = int(torch.Size(shape).numel())
        assert sum(locals_) % whole == 0, name  # once, or once a replica
        for rank, local in zip(ranks, locals_, strict=True):
            units = rank["plain"]["units"][name] if name in BLOCK_LAYERS else 0
            # Mask, inactive, explored, and the two sums of a window.
            assert rank["plain"]["held"][name] <= 5 * local + 3 * units, name
            if local < whole // 6:
                assert rank["plain"]["held"][name] < whole + 3 * units
