"""Lightning plugins: `SparseCheckpointIO` keeps checkpoints as small as the masks."""
