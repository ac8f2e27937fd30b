"""Ordinary checkpoints from sparse ones, and plain models from packed ones."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from lightning_estdgm.export._copies import without_trainer
from lightning_estdgm.modules._packed_forward import unpack_free_
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


def densify_model(model: nn.Module) -> nn.Module:
    """Return a copy of a model in which every layer stores its whole weight, in its own class.

    Layers that ``storage="packed"`` has trained stay packed after the fit. Their copies are plain layers of torch, with
    zeros, for what reads weights or sources: ``to_onnx``, ``torch.export``, ``torch.jit.script``. The copy has no
    Trainer; device, mode and ``requires_grad`` are the model's, which is left alone.

    Args:
        model: trained model, or a part of one.

    Example:
        >>> densify_model(nn.Linear(4, 2))
        Linear(in_features=4, out_features=2, bias=True)
    """
    made = without_trainer(model)
    unpack_free_(made)  # a layer at a time
    return made
