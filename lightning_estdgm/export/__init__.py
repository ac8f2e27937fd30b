"""Trained models and checkpoints in the forms that other programs read."""

from typing import TYPE_CHECKING

from lightning_estdgm._lazy import attach

if TYPE_CHECKING:
    from lightning_estdgm.export._densify import densify_checkpoint as densify_checkpoint
else:
    __getattr__, __dir__, __all__ = attach(
        __name__,
        {
            "densify_checkpoint": "lightning_estdgm.export._densify",
        },
    )
