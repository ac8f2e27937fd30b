"""Terminal of the commands: their console, an option, the line that they were called by."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

if TYPE_CHECKING:
    from lightning_estdgm.method._masks import BlockSize


def command_line() -> str:
    """Return the command that runs now, for the record."""
    program = Path(sys.argv[0]).name
    return " ".join(["estdgm" if program == "cli.py" else program, *sys.argv[1:]])


def parse_block_size(text: str) -> BlockSize | str:
    """Return a number or a pair where the text is one, else the text; whoever takes it says what is wrong with it.

    >>> parse_block_size("32"), parse_block_size("4x1"), parse_block_size("auto")
    (32, (4, 1), 'auto')
    """
    sides = text.split("x")
    if not all(side.isdecimal() for side in sides) or len(sides) > 2:
        return text
    from lightning_estdgm.method._masks import block_size_of  # loads torch, which --help does without

    return block_size_of(int(sides[0]), int(sides[-1]))


@contextmanager
def reading_checkpoint(checkpoint: Path) -> Iterator[None]:
    """Turn the refusal of objects of other classes, by ``weights_only``, into an error of the argument CKPT."""
    try:
        yield
    except pickle.UnpicklingError as e:
        message = f"{checkpoint} holds objects of other classes; if you trust it: --no-weights-only. {e}"
        raise typer.BadParameter(message, param_hint="CKPT") from e


def wide_console(columns: int) -> Console:
    """Return a console of at least so many columns: a log file has no width, and tables need some."""
    return Console(width=max(Console().width, columns))


def default_console() -> Console:
    """Return the terminal, or a console of 110 columns for a log file, which has no width; tables need as many.

    It keeps to the standard output of now, whatever is redirected later.
    """
    return Console(file=sys.stdout) if sys.stdout.isatty() else Console(file=sys.stdout, width=110)


def check_output(output: Path | None) -> None:
    """Check the path of a JSON that is asked for.

    Raises:
        typer.BadParameter: It is a folder, or does not end in .json.
    """
    if output is not None and (output.is_dir() or output.suffix != ".json"):
        raise typer.BadParameter(f"got {str(output)!r}, expected a file name that ends in .json", param_hint="--output")
