"""The source code of Python's own standard library, as a text to learn: there wherever Python is."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_estdgm.recipes._windows import TextWindows, check_val_fraction, val_start

# Not code that a person wrote to be read: tests, generated tables, installed packages, applications.
_SKIPPED = {"__pycache__", "dist-packages", "encodings", "ensurepip", "idlelib", "lib2to3"}
_SKIPPED |= {"pydoc_data", "site-packages", "test", "tests", "turtledemo"}
_GENERATED = ("_sysconfigdata", "sitecustomize")  # written by the build or by the distributor


class StdlibText(TextWindows):
    """Windows of Python source for next-byte prediction: the running Python's standard library, or any file.

    Without ``path``: the ``*.py`` files below ``sysconfig.get_path("stdlib")`` in the order of their relative paths,
    each followed by a zero byte, less tests, generated tables and installed packages. A file is for validation if
    the SHA-256 of its relative path says so: about 5 % of the files. With ``path``: the bytes of that file, the last
    ``val_fraction`` of them for validation.

    Batches are those of `TextWindows`.

    Args:
        context: Bytes a window.
        batch_size: Windows a step, of each device.
        seed: Seed of the windows.
        val_windows: Number of windows for validation.
        val_fraction: Share of the files, or of the one file, for validation.
        path: Text file; None for the standard library.

    Raises:
        ValueError: A size is not positive, the path is no file, or the text is too short for one window.

    >>> data = StdlibText(context=32, batch_size=4)
    >>> data.setup()
    >>> x, y = next(iter(data.train_dataloader()))
    >>> x.shape, bool((x[:, 1:] == y[:, :-1]).all())
    (torch.Size([4, 32]), True)
    """

    def __init__(
        self,
        context: int = 128,
        batch_size: int = 16,
        seed: int = 0,
        val_windows: int = 256,
        val_fraction: float = 0.05,
        path: str | Path | None = None,
    ) -> None:
        super().__init__(context, batch_size, seed, val_windows)
        check_val_fraction(val_fraction)
        if path is not None and not Path(path).is_file():
            raise ValueError(f"path: got {str(path)!r}, expected an existing text file")
        self.val_fraction, self.path = val_fraction, path
        self.files: dict[str, tuple[str, ...]] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read and split the text, once."""
        if self.text:
            return
        if self.path is None:
            root = Path(sysconfig.get_path("stdlib"))
            self.files = split_files(source_files(root), self.val_fraction)
            raw = {part: b"".join((root / f).read_bytes() + b"\0" for f in fs) for part, fs in self.files.items()}
        else:
            whole = Path(self.path).read_bytes()
            cut = val_start(len(whole), self.val_fraction)
            raw = {"train": whole[:cut], "val": whole[cut:]}
        self.text = {part: torch.frombuffer(bytearray(text), dtype=torch.uint8) for part, text in raw.items()}
        self.check_lengths("the standard library" if self.path is None else str(self.path), "bytes")

    def describe(self) -> dict[str, Any]:
        """Source, sizes and digests of the text, to tell whether two machines trained on the same."""
        return {
            "source": "standard library" if self.path is None else str(self.path),
            "files": {part: len(files) for part, files in self.files.items()} or None,
            "bytes": {part: len(text) for part, text in self.text.items()},
            "sha256": {part: hashlib.sha256(text.numpy().tobytes()).hexdigest() for part, text in self.text.items()},
        }


def source_files(root: Path) -> tuple[str, ...]:
    """Relative POSIX paths of the ``*.py`` files below ``root`` that are source text to learn from, sorted."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED]  # never enter them: they are large
        here = Path(folder).relative_to(root)
        found += [
            (here / name).as_posix() for name in names if name.endswith(".py") and not name.startswith(_GENERATED)
        ]
    return tuple(sorted(found))


def split_files(files: Sequence[str], val_fraction: float) -> dict[str, tuple[str, ...]]:
    """Files for training and for validation, by a hash of their names: adding a file moves no other.

    >>> split_files(["abc.py", "ast.py"], 0.05)
    {'train': ('abc.py', 'ast.py'), 'val': ()}
    """
    held_out = {
        f for f in files if int.from_bytes(hashlib.sha256(f.encode()).digest()[:8], "big") < val_fraction * 2**64
    }
    return {
        "train": tuple(f for f in files if f not in held_out),
        "val": tuple(f for f in files if f in held_out),
    }
