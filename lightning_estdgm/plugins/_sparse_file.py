"""Sparse checkpoint files: an archive of ``torch.save`` with a checksum behind it.

A file is what ``torch.save`` writes for ``{"format", "version", "pytorch-lightning_version", "checkpoint", "packed"}``
(see `packing`), followed by 8 bytes ``ESTDGM\\x00\\x01`` and the 32 bytes of the SHA-256 of all before those 40. So
``torch.load`` opens it and shows what it is, but finds no ``state_dict`` to load by mistake.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch
from fsspec.core import url_to_fs

from lightning_estdgm.plugins._whole_file import write_whole

_FORMAT = "lightning_estdgm sparse checkpoint"
_VERSION = 1
# Whoever reads the file as an ordinary checkpoint looks for Lightning's version first, and is told.
_INSTEAD_OF_VERSION = f"none: this is a {_FORMAT}; give the Trainer SparseCheckpointIO, or run `estdgm densify` on it"
_MAGIC = b"ESTDGM\x00\x01"
_TRAILER = len(_MAGIC) + hashlib.sha256().digest_size
_ZIP = b"PK\x03\x04"  # what torch.save begins with
_CHUNK = 1 << 20


def write_sparse(packed: Mapping[str, Any], path: str | Path) -> None:
    """Write what `_packing.pack` has returned, with its checksum.

    Raises:
        OSError: if it cannot be written. What was there under `path` is left as it was.

    """
    header = {"format": _FORMAT, "version": _VERSION, "pytorch-lightning_version": _INSTEAD_OF_VERSION}
    _save({**header, **packed}, path, trailer=True)


def write_ordinary(checkpoint: Any, path: str | Path) -> None:
    """Write an ordinary checkpoint, whole or not at all.

    Raises:
        OSError: if it cannot be written. What was there under `path` is left as it was.

    """
    _save(checkpoint, path, trailer=False)


def is_sparse_content(content: Any) -> bool:
    """Whether content that ``torch.load`` has read is a sparse checkpoint's."""
    return isinstance(content, dict) and content.get("format") == _FORMAT


def read_sparse(path: str | Path, map_location: Any, weights_only: bool) -> dict[str, Any] | None:
    """Read and verify a sparse checkpoint.

    Args:
        path: local, or any URL that fsspec can read.
        map_location: as for ``torch.load``.
        weights_only: as for ``torch.load``.

    Returns:
        The content, for `_packing.unpack`; ``None`` for a file that does not end as a sparse checkpoint does.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is truncated, altered, or of another version.

    """
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


class _PassingFile:
    """File for torch to write to: it passes on, hashes if asked to, and keeps an exception for later.

    An exception raised in the middle of torch's writer would come out as something else, if at all.
    """

    def __init__(self, file: IO[bytes], *, hashes: bool) -> None:
        self.digest = hashlib.sha256() if hashes else None
        self.error: BaseException | None = None
        self._file = file

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                self._file.write(data)
                if self.digest is not None:
                    self.digest.update(data)
            except BaseException as error:
                self.error = error
        return memoryview(data).nbytes

    def flush(self) -> None:
        pass


def _save(content: Any, path: str | Path, *, trailer: bool) -> None:
    def write(file: IO[bytes]) -> None:
        passing = _PassingFile(file, hashes=trailer)
        torch.save(content, cast(IO[bytes], passing))  # all that torch asks for
        if passing.error is not None:
            raise passing.error
        if passing.digest is not None:
            file.write(_MAGIC + passing.digest.digest())

    try:
        write_whole(path, write)
    except OSError as error:
        raise OSError(
            error.errno,
            f"checkpoint {path} could not be written ({error.strerror or error}); "
            "what was there under that name is as it was",
        ) from error
