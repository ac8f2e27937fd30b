"""`ShardLayout`: a strategy's way to lay a model over the GPUs."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_estdgm.tools.planner._setup import STRATEGIES, TrainingSetup

INDEX_BYTES = 4
"""Bytes of one entry of an index list."""


@dataclass(frozen=True)
class ShardLayout:
    """A model laid over the GPUs.

    Attributes:
        shards: number of parts that a weight is cut into.
        ranks: number of GPUs that gather and reduce together.
        tensor_parallel: number of GPUs that share each layer.

    """

    shards: int
    ranks: int
    tensor_parallel: int

    @classmethod
    def of(cls, setup: TrainingSetup, strategy: str) -> ShardLayout:
        """Return the layout of a strategy.

        Raises:
            ValueError: for an unknown strategy, and one that cannot be laid over so many GPUs.

        """
        if strategy == "ddp":
            return cls(1, setup.gpus, 1)
        if strategy == "fsdp2":
            return cls(setup.gpus, setup.gpus, 1)
        if strategy == "2d":
            if setup.gpus % setup.tensor_parallel:
                raise ValueError(
                    f"tensor_parallel={setup.tensor_parallel} does not divide gpus={setup.gpus}: each group of GPUs "
                    "that share a layer must be whole"
                )
            return cls(setup.gpus, setup.gpus // setup.tensor_parallel, setup.tensor_parallel)
        raise ValueError(f"strategy must be one of {STRATEGIES}, got {strategy!r}")

    @property
    def is_sharded(self) -> bool:
        """Whether a GPU holds a part of each weight only."""
        return self.shards > 1
