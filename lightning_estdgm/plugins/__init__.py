"""Lightning plugins: `SparseCheckpointIO` keeps checkpoints as small as the masks."""

from typing import TYPE_CHECKING

from lightning_estdgm._lazy import attach

if TYPE_CHECKING:
    from lightning_estdgm.plugins.checkpoint_io import SparseCheckpointIO as SparseCheckpointIO
else:
    __getattr__, __dir__, __all__ = attach(
        __name__,
        {
            "SparseCheckpointIO": "lightning_estdgm.plugins.checkpoint_io",
        },
    )
