"""`LayerDecision`: a report for users on one layer: masked or not, unit, density, backend, reasons. Decides nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from lightning_estdgm.engine._masked_weight import MaskedWeight
from lightning_estdgm.method._masks import BlockSize
from lightning_estdgm.modules._candidates import HEAD, Candidate


@dataclass(frozen=True)
class LayerDecision:
    """Decision for one layer.

    Attributes:
        name: name of the layer in the model.
        shape: shape of its weight, as stored.
        masked: whether its weight is masked.
        block_size: side of a mask unit (1: single weights); 0 where not masked.
        density: active share of its weights now; 1 where not masked.
        backend: backend that computes it now: ``"dense"`` or a sparse backend's name.
        final_density: its density at the end of the run.
        final_backend: backend at that density; ``"?"`` until measured.
        why: reasons for these, in words.

    """

    name: str
    shape: tuple[int, ...]
    masked: bool
    block_size: BlockSize
    density: float
    backend: str
    final_density: float
    final_backend: str
    why: str


def layer_decisions(
    candidates: Sequence[Candidate],
    weights: Sequence[MaskedWeight],
    final_densities: Sequence[float],
    why_dense: Mapping[str, str] = MappingProxyType({}),
) -> tuple[LayerDecision, ...]:
    """Return the decision for every linear and convolution layer of a model.

    Args:
        candidates: all linear and convolution layers.
        weights: the masked ones.
        final_densities: density of each masked one at the end of the run.
        why_dense: reasons for others that go before the candidates' own, by name.

    """
    masked = {weight.name: (weight, final) for weight, final in zip(weights, final_densities, strict=True)}
    decisions = []
    for candidate in candidates:
        shape = candidate.stored_shape
        if candidate.name not in masked:
            why = why_dense.get(candidate.name) or candidate.why or HEAD
            decision = LayerDecision(candidate.name, shape, False, 0, 1.0, "dense", 1.0, "dense", why)
        else:
            weight, final = masked[candidate.name]
            late = f"masked from step {weight.since} on, as it began to train" if weight.since else ""
            decision = LayerDecision(
                name=weight.name,
                shape=shape,
                masked=True,
                block_size=weight.block_size,
                density=weight.density,
                backend=weight.backend,
                final_density=final,
                final_backend=weight.final_backend,
                why="; ".join(filter(None, (candidate.why, late, weight.note, weight.why))),
            )
        decisions.append(decision)
    return tuple(decisions)
