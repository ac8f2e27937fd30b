"""Files of the kernel's sysfs, which may be missing, masked or forbidden."""

from __future__ import annotations

from pathlib import Path


def read_text(path: Path) -> str | None:
    """Return the text of a file without white space around it; None where it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return None


def read_number(path: Path) -> int | OSError | ValueError:
    """Return the whole number in a file, or the exception where there is none."""
    try:
        return int(path.read_text())
    except (OSError, ValueError) as e:
        return e
