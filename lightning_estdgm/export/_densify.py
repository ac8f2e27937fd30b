"""Ordinary checkpoints from sparse ones."""

from __future__ import annotations

from pathlib import Path

from lightning_estdgm.plugins._packing import unpack
from lightning_estdgm.plugins._sparse_file import read_sparse, write_ordinary


def densify_checkpoint(path: str | Path, out: str | Path | None = None, *, weights_only: bool = True) -> Path:
    """Turn a sparse checkpoint into an ordinary one, such as Lightning's own plugin would have saved.

    Args:
        path: a local file that `SparseCheckpointIO` has saved; it is left alone.
        out: where the ordinary one goes; ``None``: beside it, ``last.ckpt`` becoming ``last.dense.ckpt``.
        weights_only: as for ``torch.load``; False for files of your own that hold other objects, such as
            hyper-parameters of your own classes.

    Returns:
        The path of the ordinary checkpoint.

    Raises:
        FileExistsError: if there is something at `out`.
        ValueError: if `path` is not a sparse checkpoint, or is damaged.

    """
    path = Path(path)
    out = path.with_suffix(f".dense{path.suffix}") if out is None else Path(out)
    if out.exists():
        raise FileExistsError(f"{out} is there already; expected a new file name")
    content = read_sparse(path, "cpu", weights_only)
    if content is None:
        raise ValueError(f"{path} is not a (complete) sparse checkpoint: expected a file saved by SparseCheckpointIO")
    write_ordinary(unpack(content), out)
    return out
