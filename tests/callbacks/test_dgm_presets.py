"""Every preset through a real Trainer: a run stopped and resumed equals the run that went straight through."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from helpers.default_device import set_default_device
from helpers.models import NO_VALIDATION_LOADER, TinyMLP
from helpers.runs import Run, SaveAt, differences, end_of, load
from lightning_estdgm import DGMCallback
from lightning_estdgm.presets import PRESETS

pytestmark = [
    pytest.mark.filterwarnings(NO_VALIDATION_LOADER),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]

STOP = 18  # in the middle of an epoch, and of a window of SNFS; masks change before steps 16 and 20
DENSITY = 0.5  # that N:M has, too


class PresetRun(Run):
    def __init__(self, name: str) -> None:
        super().__init__(TinyMLP, gradient_clip_val=1.0)
        self.name = name

    def callback(self) -> DGMCallback:
        every = {} if self.name in ("static", "ac/dc") else {"update_every": 4}
        return DGMCallback.from_preset(self.name, DENSITY, backend="dense", **every)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_resumed_equals_straight(name: str, tmp_path: Path) -> None:
    run, path = PresetRun(name), tmp_path / "stop.ckpt"
    straight = run.fit(SaveAt("on_train_batch_end", STOP, path))
    end = end_of(*straight)
    assert differences(end, end_of(*run.fit(ckpt=path, seed=1))) == []
    updates = straight[1].controller.updates
    assert (updates == 0) == (name == "static")
    assert straight[1].density == pytest.approx(DENSITY, abs=0.05)


class Unlogged(TinyMLP):
    """Logs nothing: Lightning makes the tensors of `log` on the default device."""

    def log(self, *args: Any, **kwargs: Any) -> None:
        pass


class Elsewhere(Callback):
    """New tensors are made on a device without values for as long as the fit lasts."""

    def setup(self, *args: Any, **kwargs: Any) -> None:
        set_default_device("meta")

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        set_default_device(None)

    on_exception = teardown


@pytest.mark.skipif(torch.__version__ < "2.7", reason="AdamW of torch 2.6 itself cannot step with this default device")
@pytest.mark.parametrize("name", sorted(PRESETS))
def test_another_default_device_changes_nothing(name: str, tmp_path: Path) -> None:
    run, path = PresetRun(name), tmp_path / "stop.ckpt"
    run.cls = Unlogged
    end = end_of(*run.fit())
    assert differences(end, end_of(*run.fit(SaveAt("on_train_batch_end", STOP, path), before=(Elsewhere(),)))) == []
    assert differences(end, end_of(*run.fit(ckpt=path, seed=1, before=(Elsewhere(),)))) == []


def _no_reserve(state: dict[str, Any]) -> None:
    for layer in state["layers"].values():
        layer["held_back"]["weights"].zero_()


def _nothing_learns(state: dict[str, Any]) -> None:
    for layer in state["layers"].values():
        layer["held_back"]["learning"].copy_(layer["mask"])


@pytest.mark.parametrize("spoil", [_no_reserve, _nothing_learns])
def test_control_what_is_held_back_matters(spoil: Callable[[dict[str, Any]], None], tmp_path: Path) -> None:
    run, path = PresetRun("top-kast"), tmp_path / "stop.ckpt"
    end = end_of(*run.fit(SaveAt("on_train_batch_end", STOP, path)))
    checkpoint = load(path)
    spoil(checkpoint["callbacks"]["DGMCallback"])
    torch.save(checkpoint, path)
    assert differences(end, end_of(*run.fit(ckpt=path, seed=1))) != []


def test_a_checkpoint_without_a_reserve_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "stop.ckpt"
    PresetRun("top-kast").fit(SaveAt("on_train_batch_end", STOP, path))
    checkpoint = load(path)
    for layer in checkpoint["callbacks"]["DGMCallback"]["layers"].values():
        del layer["held_back"]
    torch.save(checkpoint, path)
    with pytest.raises(
        ValueError,
        match=r"layer 'net\.0': the checkpoint holds none of the weights that a backward set trains\. "
        r"Pass the inactive= of its run to go on; .* load the weights and begin a run without ckpt_path=",
    ):
        PresetRun("top-kast").fit(ckpt=path, seed=1)
