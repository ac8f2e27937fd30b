"""Stacks of experts as cases for the selector, and the choice of all stacks of a module together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lightning_estdgm.engine._masked_weight import MaskedWeight
from lightning_estdgm.modules._candidates import Candidate
from lightning_estdgm.sparse.autotune._expert_case import ExpertCase


def expert_case(weight: MaskedWeight, rows: int, density: float, dtype: torch.dtype, form: str) -> ExpertCase:
    """Return the case of a stack of experts.

    Args:
        weight: weight of the stack.
        rows: number of rows that all experts together are multiplied with.
        density: active share of the blocks.
        dtype: dtype of the products.
        form: how its module computes it by itself, as of `ExpertCase`.

    """
    kind = weight.candidate.kind
    transposed = not kind.inputs_last
    stacked, last = weight.shape
    out, inner = (last, stacked // kind.experts) if transposed else (stacked // kind.experts, last)
    return ExpertCase(
        tokens=rows,
        out_features=out,
        in_features=inner,
        block_size=weight.block_size,
        density=density,
        dtype=dtype,
        device=weight.device,
        frozen=weight.inactive.act_in_forward,
        transposed=transposed,
        experts=kind.experts,
        dense=form,
    )


def together(
    chosen: Mapping[MaskedWeight, tuple[str, str]], candidates: Sequence[Candidate]
) -> dict[MaskedWeight, tuple[str, str]]:
    """Return backends and reasons where a module's stacks of experts are all sparse, or all dense.

    A module has one forward: its own, which computes all stacks dense, or the one that asks for each product. A stack
    that is dense in the latter would not run as it was timed.

    Args:
        chosen: backend and reason of each weight, by itself.
        candidates: all layers of the model, masked or not.

    """
    settled = dict(chosen)
    backends = {weight.name: backend for weight, (backend, _) in chosen.items()}
    for weight, (backend, _) in chosen.items():
        if not weight.candidate.kind.experts or backend == "dense":
            continue
        others = [c.name for c in candidates if c.kind.experts and c.module is weight.candidate.module]
        if dense := [name for name in others if backends.get(name, "dense") == "dense"]:
            why = f"its module's forward is its own, since {dense[0].rpartition('.')[2]} is dense"
            settled[weight] = ("dense", f"{chosen[weight][1]}, but {why}")
    return settled
