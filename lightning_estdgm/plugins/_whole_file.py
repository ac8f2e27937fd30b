"""Files that are all there under their name or not there at all, local or on any file system that fsspec can write."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

_PREFIX, _SUFFIX = ".estdgm-", ".tmp"  # no part of the final name: Lightning would take the file for a checkpoint
_STALE_S = 24 * 3600.0


def write_whole(path: str | Path, write: Callable[[IO[bytes]], None]) -> None:
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
                shutil.rmtree(file) if file.is_dir() else file.unlink()


@contextlib.contextmanager
def whole_folder(parent: Path) -> Iterator[tuple[Path, Callable[[str], tuple[Path, ...]]]]:
    """Yield an empty local folder beside files to come, and a function that moves what was written there to `parent`.

    It takes the name of the main file, which is moved last and returned first: once that is there, all are. What is not
    moved in the end is removed.

    Raises:
        FileExistsError: by that function, if `parent` has a file of one of the names; nothing was moved then.

    """
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, suffix=_SUFFIX, dir=parent))

    def publish(main: str) -> tuple[Path, ...]:
        names = [main, *sorted(file.name for file in folder.iterdir() if file.name != main)]
        if there := [name for name in names if (parent / name).exists()]:
            raise FileExistsError(f"{parent / there[0]} is there already; expected a new file name")
        for name in reversed(names):
            os.replace(folder / name, parent / name)
        _sync_folder(parent)
        return tuple(parent / name for name in names)

    try:
        yield folder, publish
    finally:
        shutil.rmtree(folder, ignore_errors=True)
