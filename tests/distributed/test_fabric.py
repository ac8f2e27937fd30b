"""Loops of Lightning's Fabric, on one device and over two ranks: a controller of what `Fabric.setup` returns."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.data import DataLoader, TensorDataset

from helpers import distributed_jobs as jobs
from helpers.distributed_cases import differences
from lightning_estdgm import DGMConfig, DGMController, EstDgm, Phase, Units

SCHEDULE = EstDgm(
    Phase(0.7, 0.6, 10), Phase(0.3, 0.3, 10), Phase(0.2, 0.1, 20), update_every=5, observe_steps=2, freeze=0.5
)
STEPS, BATCH = 40, 16
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "units of 4": {"unit": 4},
    "packed": {"storage": "packed"},
    "accumulation": {"accumulate": 2},
    "clipping": {"clip": 0.5},
    "bf16": {"precision": "bf16-mixed"},
}


def train(
    ranks: int,
    unit: int = 1,
    storage: str = "dense",
    accumulate: int = 1,
    clip: float | None = None,
    precision: Any = "32-true",
) -> dict[str, Any]:
    """Train on a fixed order of samples, of which each rank takes its share of every batch."""
    fabric = Fabric(
        accelerator="cpu",
        devices=ranks,
        strategy=DDPStrategy(process_group_backend="gloo") if ranks > 1 else "auto",
        precision=precision,
    )
    fabric.launch()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    net = net.double() if precision == "32-true" else net  # so that sums in another order come to the same masks
    model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), 1e-2))
    x = torch.randn(STEPS * accumulate * BATCH, 16, generator=torch.Generator().manual_seed(1)).to(net[0].weight)
    loader = fabric.setup_dataloaders(DataLoader(TensorDataset(x), batch_size=BATCH // ranks))
    config = DGMConfig(SCHEDULE, units=Units(size=unit), storage=storage)  # type: ignore[arg-type]
    group = dist.group.WORLD if ranks > 1 else None
    with DGMController(model, optimizer, config, total_steps=STEPS, group=group) as dgm:
        for index, (batch,) in enumerate(loader):
            is_last = (index + 1) % accumulate == 0
            with fabric.no_backward_sync(model, enabled=not is_last):
                loss = (model(batch) - batch.sum(1, keepdim=True)).square().mean()
                fabric.backward(loss / accumulate)
            if is_last:
                dgm.mask_gradients()
                if clip is not None:
                    fabric.clip_gradients(model, optimizer, max_norm=clip)
                optimizer.step()
                optimizer.zero_grad()
                dgm.advance()
        weights: dict[str, Tensor] = {name: weight.clone() for name, weight in net.state_dict().items()}
        masks = {name.split("module.")[-1]: mask for name, mask in dgm.masks().items()}
        return {"masks": masks, "weights": weights, "density": dgm.density, "steps": dgm.steps}


def all_runs() -> dict[str, dict[str, Any]]:
    return {name: train(2, **settings) for name, settings in SETTINGS.items()}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, dict[str, Any]]]:
    return jobs.run(all_runs, 2)


@pytest.mark.parametrize("name", SETTINGS)
def test_two_ranks_train_as_one(ranks: list[dict[str, dict[str, Any]]], name: str) -> None:
    first, second = (rank[name] for rank in ranks)
    assert differences(first, second) == []
    assert first["steps"] == STEPS
    assert first["density"] == pytest.approx(0.1, rel=0.05)
    if name == "bf16":  # sums in another order are other numbers there
        return
    one = train(1, **SETTINGS[name])
    assert differences(first["masks"], one["masks"]) == []
    for key, weight in one["weights"].items():
        torch.testing.assert_close(first["weights"][key], weight, rtol=1e-6, atol=1e-9)


def one_device(
    storage: str, path: Path, start: int = 0, stop: int = STEPS, in_place: Sequence[str] = ()
) -> tuple[dict[str, Tensor], ...]:
    """Train from step `start` to step `stop`; go on from `path` if it is not the first, save there if not the last.

    Where `in_place` names objects, these are made first, and loaded in that order.
    """
    fabric = Fabric(accelerator="cpu", devices=1)
    torch.manual_seed(start)  # a resumed run is drawn otherwise, and must not show it
    net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), 1e-2))
    saved = fabric.load(path) if start and not in_place else {}
    if saved:
        model.load_state_dict(saved["model"])
    config = DGMConfig(SCHEDULE, units=Units(size=1), storage=storage)  # type: ignore[arg-type]
    with DGMController(model, optimizer, config, total_steps=STEPS, state=saved.get("dgm")) as dgm:
        if saved:
            optimizer.load_state_dict(saved["optimizer"])
        objects = {"model": model, "optimizer": optimizer, "dgm": dgm}
        if start and in_place:
            fabric.load(path, {name: objects[name] for name in in_place})
        for x in torch.randn(STEPS, BATCH, 16, generator=torch.Generator().manual_seed(1))[start:stop]:
            optimizer.zero_grad()
            fabric.backward((model(x) - x.sum(1, keepdim=True)).square().mean())
            dgm.mask_gradients()
            optimizer.step()
            dgm.advance()
        if stop < STEPS:
            fabric.save(path, objects)
        return dgm.masks(), {name: weight.clone() for name, weight in model.state_dict().items()}


@pytest.mark.parametrize("step", [9, 30])  # inside an observation window, and at a mask update
@pytest.mark.parametrize("storage", ["dense", "packed"])
def test_resumed_equals_straight(storage: str, step: int, tmp_path: Path) -> None:
    straight = one_device(storage, tmp_path / "saved.ckpt")
    assert straight[0].keys() == {"0", "2"}, "names are free of Fabric's wrapper"
    one_device(storage, tmp_path / "saved.ckpt", stop=step)
    assert differences(straight, one_device(storage, tmp_path / "saved.ckpt", start=step)) == []


@pytest.mark.parametrize("order", [*permutations(("model", "optimizer", "dgm"))], ids="-".join)
@pytest.mark.parametrize("storage", ["dense", "packed"])
def test_objects_load_in_place_in_any_order(storage: str, order: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"
    straight = one_device(storage, path)
    one_device(storage, path, stop=13)
    assert differences(straight, one_device(storage, path, start=13, in_place=order)) == []


@pytest.mark.filterwarnings("ignore:.*something wrote to its inactive weights through `.data`:RuntimeWarning")
def test_a_file_of_fabric_holds_no_more_than_the_masks(tmp_path: Path) -> None:
    """Fabric asks the network for its state, not the wrapper that the controller was given."""
    fabric = Fabric(accelerator="cpu", devices=1)
    net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1))
    model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), 1e-2))
    config = DGMConfig(SCHEDULE, units=Units(size=1))
    with DGMController(model, optimizer, config, total_steps=STEPS, audit=False) as dgm:
        net[0].weight.data.add_(1.0)
        fabric.save(tmp_path / "file.ckpt", {"model": model})
        (mask,) = dgm.masks().values()
    saved = torch.load(tmp_path / "file.ckpt", weights_only=True)["model"]["0.weight"]
    assert torch.equal(saved != 0, mask)
