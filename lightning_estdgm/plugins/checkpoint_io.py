"""`SparseCheckpointIO`: checkpoints without the zeros of inactive weights, written whole or not at all, and verified.

A file is what ``torch.save`` writes for ``{"format", "version", "pytorch-lightning_version", "checkpoint", "packed"}``
(see `packing`), followed by 8 bytes ``ESTDGM\\x00\\x01`` and the 32 bytes of the SHA-256 of all before those 40. So
``torch.load`` opens it and shows what it is, but finds no ``state_dict`` to load by mistake.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy

from lightning_estdgm.plugins.packing import pack, unpack

__all__ = ["SparseCheckpointIO", "densify_checkpoint"]

_FORMAT = "lightning_estdgm sparse checkpoint"
_VERSION = 1
# Whoever reads the file as an ordinary checkpoint looks for Lightning's version first, and is told.
_INSTEAD_OF_VERSION = f"none: this is a {_FORMAT}; give the Trainer SparseCheckpointIO, or run `estdgm densify` on it"
_MAGIC = b"ESTDGM\x00\x01"
_TRAILER = len(_MAGIC) + hashlib.sha256().digest_size
_ZIP = b"PK\x03\x04"  # what torch.save begins with
_CHUNK = 1 << 20
_PREFIX, _SUFFIX = ".estdgm-", ".tmp"  # no part of the final name: Lightning would take the file for a checkpoint
_STALE_S = 24 * 3600.0
_BYPASSING = (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)


class SparseCheckpointIO(CheckpointIO):
    """Save checkpoints without the zeros of inactive weights, and load them back to the bit.

    Weights and optimizer state of masked layers are stored as active values; the masks are those that `DGMCallback` has
    saved in the same checkpoint. Each tensor is checked: one that holds anything where its mask is inactive is stored
    dense. Loading gives the checkpoint that Lightning's own plugin would have given. A file is complete under its name
    or not there: it is written to a temporary file in the same folder, synced, and renamed. Its SHA-256 is verified
    before anything is loaded.

    Ordinary checkpoints are loaded too. For asynchronous saving wrap it: ``AsyncCheckpointIO(SparseCheckpointIO())``.
    ``load_from_checkpoint`` and strategies that load past the plugin need `densify_checkpoint` first.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(plugins=[SparseCheckpointIO()], logger=False, accelerator="cpu")

    """

    def check_strategy(self, strategy: Strategy) -> None:
        """Refuse a strategy that would save through this plugin and then not load through it.

        Raises:
            ValueError: for DeepSpeed, FSDP and FSDP2 (`ModelParallelStrategy`).

        """
        if isinstance(strategy, _BYPASSING):
            raise ValueError(
                f"{type(strategy).__name__} loads checkpoints past its CheckpointIO, so it could not read what "
                "SparseCheckpointIO saves: leave the plugin out, or use a strategy that keeps whole weights on each "
                "rank, such as 'ddp'"
            )

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save a checkpoint.

        Args:
            checkpoint: as Lightning makes it.
            path: local, or any URL that fsspec can write.
            storage_options: must be ``None``, as for Lightning's own plugin.

        Raises:
            OSError: if it cannot be written (such as on a full disk). What was there under `path` is left as it was.

        """
        if storage_options is not None:
            raise TypeError(f"SparseCheckpointIO takes no storage_options, got {storage_options!r}")
        header = {"format": _FORMAT, "version": _VERSION, "pytorch-lightning_version": _INSTEAD_OF_VERSION}
        _save(header | pack(checkpoint), path, trailer=True)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Load a checkpoint that this plugin or Lightning's own has saved.

        Args:
            path: local, or any URL that fsspec can read.
            map_location: as for ``torch.load``.
            weights_only: as for ``torch.load``; ``None`` means True.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is truncated or altered.

        """
        weights_only = True if weights_only is None else weights_only
        if (content := _load_sparse(path, map_location, weights_only)) is not None:
            return unpack(content)
        checkpoint = TorchCheckpointIO().load_checkpoint(path, map_location, weights_only)
        if isinstance(checkpoint, dict) and checkpoint.get("format") == _FORMAT:
            raise ValueError(f"sparse checkpoint {path} is damaged: the checksum at its end is cut off or altered")
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint; does nothing if there is none."""
        TorchCheckpointIO().remove_checkpoint(path)


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
    content = _load_sparse(path, "cpu", weights_only)
    if content is None:
        raise ValueError(f"{path} is not a (complete) sparse checkpoint: expected a file saved by SparseCheckpointIO")
    _save(unpack(content), out, trailer=False)
    return out


# --------------------------------------------------------------------------- reading


def _load_sparse(path: str | Path, map_location: Any, weights_only: bool) -> dict[str, Any] | None:
    """Read and verify a sparse checkpoint; ``None`` for a file that does not end as one does."""
    files, name = url_to_fs(str(path))
    if not files.exists(name):
        raise FileNotFoundError(f"Checkpoint file not found: {path}")
    if not files.isfile(name):
        raise ValueError(f"expected a checkpoint file, got the folder {path}")
    with files.open(name, "rb") as file:
        length = file.seek(0, os.SEEK_END) - _TRAILER
        file.seek(max(0, length))
        trailer = file.read()
        if not trailer.startswith(_MAGIC):
            if _is_cut_off(file):
                raise ValueError(f"{path} is truncated or damaged: it begins as a checkpoint but does not end as one")
            return None
        file.seek(0)
        digest, left = hashlib.sha256(), length
        while left and (chunk := file.read(min(_CHUNK, left))):
            digest.update(chunk)
            left -= len(chunk)
        if digest.digest() != trailer[len(_MAGIC) :]:
            raise ValueError(f"sparse checkpoint {path} is damaged: its SHA-256 is not the one that was saved with it")
        file.seek(0)
        content = torch.load(file, map_location=map_location, weights_only=weights_only)
    if content["version"] != _VERSION:
        raise ValueError(f"expected a sparse checkpoint of version {_VERSION}, got {content['version']} in {path}")
    return content


def _is_cut_off(file: IO[bytes]) -> bool:
    """Whether a file begins as torch.save begins one (or with a part of that) and lacks the end."""
    file.seek(0)
    if not _ZIP.startswith(file.read(len(_ZIP))):
        return False
    try:
        return not zipfile.is_zipfile(file)
    except zipfile.BadZipFile:
        return True


# --------------------------------------------------------------------------- writing


class _HashingFile:
    """What torch writes to: passes on, hashes, and keeps an exception for later.

    Raised in the middle of torch's writer it would come out as something else, if at all.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.digest = hashlib.sha256()
        self.error: BaseException | None = None
        self._file = file

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                self._file.write(data)
                self.digest.update(data)
            except BaseException as error:
                self.error = error
        return memoryview(data).nbytes

    def flush(self) -> None:
        pass


def _save(content: Any, path: str | Path, *, trailer: bool) -> None:
    def write(file: IO[bytes]) -> None:
        hashing = _HashingFile(file)
        torch.save(content, cast(IO[bytes], hashing))  # all that torch asks for
        if hashing.error is not None:
            raise hashing.error
        if trailer:
            file.write(_MAGIC + hashing.digest.digest())

    try:
        _write_whole(path, write)
    except OSError as error:
        raise OSError(
            error.errno,
            f"checkpoint {path} could not be written ({error.strerror or error}); "
            "what was there under that name is as it was",
        ) from error


def _write_whole(path: str | Path, write: Callable[[IO[bytes]], None]) -> None:
    """Write a file so that there is all of it under its name or, should anything happen, what was there before."""
    files, name = url_to_fs(str(path))
    files.makedirs(os.path.dirname(name), exist_ok=True)
    if not isinstance(files, LocalFileSystem):
        with files.transaction, files.open(name, "wb") as file:
            write(file)
        return
    final = Path(name)
    _remove_stale(final.parent)
    temporary = final.parent / f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}"
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, final)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(final.parent)


def _sync_folder(folder: Path) -> None:
    """Make the renaming last; where folders cannot be opened or synced (Windows, some mounts) the system does it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove_stale(folder: Path) -> None:
    """Remove the temporary files of writers that were killed, once they are a day old."""
    for file in folder.glob(f"{_PREFIX}*{_SUFFIX}"):
        with contextlib.suppress(OSError):
            if time.time() - file.stat().st_mtime > _STALE_S:
                file.unlink()
