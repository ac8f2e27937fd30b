"""Lightning plugins: `SparseCheckpointIO` keeps checkpoints as small as the masks."""

from lightning_estdgm.plugins.checkpoint_io import SparseCheckpointIO, densify_checkpoint

__all__ = ["SparseCheckpointIO", "densify_checkpoint"]
