"""A text on disk, memory-mapped: WikiText-103 in its published layout, or any text file."""

from __future__ import annotations

import hashlib
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from lightning_estdgm.recipes._windows import TextWindows, check_val_fraction, val_start

_HELP = """expected a text file, or a folder as WikiText-103 is published:
  wikitext-103/      wiki.train.tokens  wiki.valid.tokens  wiki.test.tokens
  wikitext-103-raw/  wiki.train.raw     wiki.valid.raw     wiki.test.raw
Its authors offer it as wikitext-103-v1.zip and wikitext-103-raw-v1.zip (Merity et al. 2016, arXiv 1609.07843); \
Hugging Face lists it as the data set Salesforce/wikitext. Unpack it and give that folder."""


class TextFiles(TextWindows):
    """Windows of WikiText-103, or of any text files, of each of which the last ``val_fraction`` is for validation.

    Without a tokenizer a token is a byte, and the files themselves are memory-mapped; several are read into memory.
    With one, the tokens are written once to a file, which is memory-mapped then; it is made anew when the text or the
    tokenizer changes.
    Batches are those of `TextWindows`.

    Args:
        path: Text file or a list of several, or the folder of WikiText-103 (its raw variant too).
        context: Tokens a window.
        batch_size: Windows a step, of each device.
        seed: Seed of the windows.
        val_windows: Number of windows for validation.
        val_fraction: Share at the end of each text file for validation; a folder has a file of its own for it.
        tokenizer: A ``tokenizer.json`` of Hugging Face tokenizers; without one, tokens are bytes.
        cache: Folder for the files of tokens; without one, they go beside the text.
        workers: Number of processes that read ahead.

    Raises:
        FileNotFoundError: There is no such text or tokenizer.
        ValueError: A size is not positive, or the text is too short for one window.
        ModuleNotFoundError: A tokenizer is given, and the package `tokenizers` is not installed.

    """

    def __init__(
        self,
        path: str | Sequence[str],
        context: int = 1024,
        batch_size: int = 16,
        seed: int = 0,
        val_windows: int = 256,
        val_fraction: float = 0.05,
        tokenizer: str | None = None,
        cache: str | None = None,
        workers: int = 0,
    ) -> None:
        super().__init__(context, batch_size, seed, val_windows, workers)
        check_val_fraction(val_fraction)
        self.files = find_text(Path(path)) if isinstance(path, str | Path) else _joined_files(path)
        self.val_fraction = val_fraction
        self.cache = None if cache is None else Path(cache)
        self.tokenizer = None if tokenizer is None else Path(tokenizer)
        self.vocabulary = 256 if self.tokenizer is None else _load_tokenizer(self.tokenizer).get_vocab_size()

    def prepare_data(self) -> None:
        """Write the files of tokens that are not there yet; one process of a machine does."""
        if self.tokenizer is not None:
            for file in dict.fromkeys(file for files in self.files.values() for file in files):
                _tokens_file(file, self.tokenizer, self.cache)

    def setup(self, stage: str | None = None) -> None:
        """Map the files and split them, once."""
        if self.text:
            return
        parts = {part: [self._map(file) for file in files] for part, files in self.files.items()}
        if self.files["train"] == self.files["val"]:
            cuts = [val_start(len(text), self.val_fraction) for text in parts["train"]]
            parts["train"] = [text[:cut] for text, cut in zip(parts["train"], cuts, strict=True)]
            parts["val"] = [text[cut:] for text, cut in zip(parts["val"], cuts, strict=True)]
        # torch.cat of one would copy what is mapped
        self.text = {part: texts[0] if len(texts) == 1 else torch.cat(texts) for part, texts in parts.items()}
        source = ", ".join(str(file) for file in self.files["train"])
        self.check_lengths(source, "bytes" if self.tokenizer is None else "tokens")

    def _map(self, file: Path) -> torch.Tensor:
        if self.tokenizer is None:
            dtype: Any = np.uint8
        else:
            file, dtype = _tokens_file(file, self.tokenizer, self.cache), _dtype(self.vocabulary)
        if not file.stat().st_size:
            return torch.empty(0, dtype=torch.uint8)
        with warnings.catch_warnings():
            # Read-only, for a private map would be counted as memory; nothing here writes to it.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            return torch.from_numpy(np.memmap(file, dtype, mode="r"))


def find_text(path: Path) -> dict[str, tuple[Path, ...]]:
    """Files for training and validation; both are ``path`` if it is a file.

    Raises:
        FileNotFoundError: There is no text; the message says what was looked for and where to get it.
    """
    if path.is_file():
        return {"train": (path,), "val": (path,)}
    missing = "no such file or folder"
    if path.is_dir():
        for ending in ("tokens", "raw"):
            files = {"train": path / f"wiki.train.{ending}", "val": path / f"wiki.valid.{ending}"}
            if all(file.is_file() for file in files.values()):
                return {part: (file,) for part, file in files.items()}
        missing = "no wiki.train.tokens with wiki.valid.tokens in it, nor the same with .raw"
    raise FileNotFoundError(f"data: got {str(path)!r}, {missing}; {_HELP}")


def _joined_files(paths: Sequence[str]) -> dict[str, tuple[Path, ...]]:
    """Files for training and validation, both all of `paths`.

    Raises:
        FileNotFoundError: There is none, or one is missing; the message names it.
        ValueError: The list is empty.
    """
    files = tuple(Path(path) for path in paths)
    if not files:
        raise ValueError("path: got an empty list, expected a text file or several")
    if missing := [str(file) for file in files if not file.is_file()]:
        raise FileNotFoundError(f"data: got {list(paths)}, missing {', '.join(missing)}; {_HELP}")
    return {"train": files, "val": files}


def _dtype(vocabulary: int) -> Any:
    return np.uint16 if vocabulary <= 2**16 else np.int32


def _load_tokenizer(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer: got {str(path)!r}, expected a tokenizer.json of Hugging Face tokenizers")
    try:
        from tokenizers import Tokenizer
    except ImportError as e:
        raise ModuleNotFoundError("a tokenizer needs the package tokenizers: pip install tokenizers") from e
    try:
        return Tokenizer.from_file(str(path))
    except Exception as e:  # it raises nothing more special
        raise ValueError(f"tokenizer: {path} is no tokenizer.json of Hugging Face tokenizers: {e}") from e


def _tokens_file(text: Path, tokenizer: Path, cache: Path | None) -> Path:
    """File of the text's tokens, written whole or not at all."""
    state = text.stat()
    key = hashlib.sha256(tokenizer.read_bytes())
    key.update(f"{text.resolve()} {state.st_size} {state.st_mtime_ns}".encode())
    file = (cache or text.parent) / f"{text.name}.{key.hexdigest()[:16]}.tokens.bin"
    if file.is_file():
        return file
    encoder = _load_tokenizer(tokenizer)
    folder = file.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".tokens-") as private:
            partial = Path(private) / "partial"
            with text.open(encoding="utf-8", newline="") as lines, partial.open("wb") as out:
                for some in _chunks(lines):
                    for encoded in encoder.encode_batch(some, add_special_tokens=False):
                        out.write(np.asarray(encoded.ids, dtype=_dtype(encoder.get_vocab_size())).tobytes())
            partial.replace(file)
    except OSError as e:
        message = f"the tokens of {text} cannot be written to {folder} ({e}); name another folder as cache"
        raise OSError(message) from e
    except UnicodeDecodeError as e:
        raise ValueError(f"{text}: expected UTF-8 text for the tokenizer, got {e}") from e
    return file


def _chunks(lines: IO[str]) -> Iterator[list[str]]:
    while some := lines.readlines(2**22):  # about four million characters
        yield some
