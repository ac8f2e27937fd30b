"""Layers whose forward is swapped for one on active blocks, and what tests look at in them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_estdgm.method._masks import expand_mask
from lightning_estdgm.modules._candidates import Candidate, find_candidates
from lightning_estdgm.modules._swap import sparsify_
from lightning_estdgm.sparse._operands import topology_arguments


def candidate(module: nn.Module) -> Candidate:
    """A layer as a candidate, found in a model of it and a head."""
    return find_candidates(nn.Sequential(module, nn.Linear(8, 2)))[0]


def swapped(
    backend: str = "reference", frozen: bool = False, module: nn.Module | None = None
) -> tuple[Candidate, Tensor]:
    """A swapped layer of 48 outputs and 32 inputs, and the mask of its weights."""
    torch.manual_seed(0)
    c = candidate(module or nn.Linear(32, 48))
    mask = torch.tensor([[True, False], [False, True], [True, True]])
    sparsify_(c, mask, 16, backend, frozen)
    return c, expand_mask(mask, 16)


def index_lists(module: nn.Module) -> list[Tensor]:
    """The four index lists of a layer's topology; none of a layer that is not swapped."""
    topology = getattr(module, "_estdgm_topology", None)
    return [] if topology is None else list(topology_arguments(topology)[:4])


def run(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output of a layer, and the gradients of its input and weight."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    y = module(x)
    y.square().sum().backward()
    return y.detach(), x.grad, module.weight.grad.clone()
