"""Layers that begin to train in mid-run are taken in on all ranks alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from helpers import distributed_jobs as jobs
from helpers.runs import differences
from lightning_estdgm import DGMConfig, DGMController, EstDgm, Phase, Units

SCHEDULE = EstDgm(
    Phase(0.7, 0.6, 15), Phase(0.3, 0.3, 15), Phase(0.2, 0.1, 30), update_every=5, observe_steps=2, freeze=0.5
)
STEPS, LATE = 60, 23


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.branch = nn.Sequential(nn.Linear(16, 16), nn.ReLU()), nn.Linear(16, 16)
        self.frozen, self.head = nn.Linear(16, 16), nn.Linear(16, 1)
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor, use_branch: bool) -> torch.Tensor:
        h = self.frozen(self.body(x))
        return self.head(h + self.branch(h).relu() if use_branch else h)


def train(_: str) -> dict[str, Any]:
    rank = dist.get_rank()
    net = Net()
    ddp = DistributedDataParallel(net, find_unused_parameters=True)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    x = torch.randn(16, 16, generator=torch.Generator().manual_seed(rank))
    config = DGMConfig(SCHEDULE, units=Units(size=1), backend="dense")
    with DGMController(ddp, optimizer, config, total_steps=STEPS, group=dist.group.WORLD) as dgm:
        for step in range(STEPS):
            optimizer.zero_grad()
            ddp(x, step >= LATE and (rank == 1 or step >= LATE + 1)).square().mean().backward()
            dgm.mask_gradients()
            optimizer.step()
            dgm.advance()
        net.frozen.requires_grad_(True)  # which DDP was not made with
        return {
            "masks": {name.removeprefix("module."): mask for name, mask in dgm.masks().items()},
            "weights": net.state_dict(),
            "density": (dgm.density, dgm.final_density),
            "late": dgm.late_layers(),
            "why": [d.why for d in dgm.decisions()],
        }


def test_ranks_take_in_the_same_late_layers_and_leave_frozen_ones_to_a_warning() -> None:
    first, second = jobs.run(train, 2, "")
    assert differences(first, second) == []
    assert first["masks"].keys() == {"body.0", "branch"}
    assert first["density"][0] == first["density"][1]
    assert first["late"] == ["module.frozen"]
    assert any("as it began to train" in why for why in first["why"])
    for name, mask in first["masks"].items():
        assert not first["weights"][f"{name}.weight"][~mask].count_nonzero()
