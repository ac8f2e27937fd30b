"""`TrainingSetup`: the training that a plan is for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_estdgm._checks import check_int
from lightning_estdgm.method._distributions import DISTRIBUTIONS
from lightning_estdgm.method._masks import BlockSize
from lightning_estdgm.modules._mask_unit import check_unit_size

STRATEGIES = ("ddp", "fsdp2", "2d")
"""DDP; FSDP2 over all GPUs; FSDP2 over groups of GPUs that share each layer by tensor parallelism."""

OPTIMIZER_STATES = {"adamw": 2, "sgd-momentum": 1, "sgd": 0}
"""Number of tensors that an optimizer keeps for a weight."""

_PARAMETER_BYTES = {"32-true": 4, "bf16-mixed": 4, "bf16-true": 2}


@dataclass(frozen=True)
class TrainingSetup:
    """Training that a plan is for.

    Attributes:
        gpus: number of GPUs of the whole job.
        density: active share of the masked weights, in (0, 1]; the default is where EST-DGM ends.
        tensor_parallel: number of GPUs that share each layer, under "2d".
        precision: "32-true", "bf16-mixed" or "bf16-true".
        optimizer: "adamw", "sgd-momentum" or "sgd".
        block_size: side of a mask unit: 1 or a block size; "auto": the largest block that fits (a run times units).
        distribution: "erk" or "uniform".
        tokens: number of tokens that one GPU trains on in a step.
        update_every: optimizer steps between mask updates.
        observe_steps: number of them that are observed.

    Raises:
        TypeError: for a count that is no int.
        ValueError: for values that no run would take.

    """

    gpus: int = 8
    density: float = 0.1
    tensor_parallel: int = 2
    precision: str = "32-true"
    optimizer: str = "adamw"
    block_size: BlockSize | Literal["auto"] = "auto"
    distribution: str = "erk"
    tokens: int = 16_384
    update_every: int = 200
    observe_steps: int = 8

    def __post_init__(self) -> None:
        for name in ("gpus", "tensor_parallel", "tokens", "update_every", "observe_steps"):
            check_int(name, getattr(self, name), at_least=1)
        if not 0.0 < self.density <= 1.0:
            raise ValueError(f"density must lie in (0, 1], got {self.density}")
        if self.observe_steps > self.update_every:
            raise ValueError(
                f"observe_steps must not exceed update_every, got {self.observe_steps} and {self.update_every}"
            )
        for name, known in (("precision", tuple(_PARAMETER_BYTES)), ("optimizer", tuple(OPTIMIZER_STATES))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        if self.block_size != "auto":
            check_unit_size("block_size", self.block_size)
        if self.distribution not in DISTRIBUTIONS:
            raise ValueError(f"distribution must be one of {sorted(DISTRIBUTIONS)}, got {self.distribution!r}")

    @property
    def parameter_bytes(self) -> int:
        """Bytes of one weight, gradient or optimizer state."""
        return _PARAMETER_BYTES[self.precision]

    @property
    def optimizer_states(self) -> int:
        """Number of tensors that the optimizer keeps for a weight."""
        return OPTIMIZER_STATES[self.optimizer]
