"""Where the study finds data sets that are not part of the package: it reads them from disk and downloads nothing."""

from __future__ import annotations

import os
from pathlib import Path

DATA_VARIABLE = "ESTDGM_DATA"
"""Environment variable with the folder of the data sets; ``estdgm study --data`` sets it."""

_INSTALLED = Path("/usr/share/datasets")  # where Debian's packages put data sets


def data_folder(name: str) -> str:
    """Return the folder of a data set: below `DATA_VARIABLE`'s, else where a package of the system has it.

    Args:
        name: name of the data set's own folder, such as ``"planetoid"``.

    Returns:
        the folder; one that is not there, in the first of these places, where none is.

    """
    own = Path(os.environ.get(DATA_VARIABLE, "data")) / name
    installed = _INSTALLED / name
    return str(installed if installed.is_dir() and not own.is_dir() else own)
