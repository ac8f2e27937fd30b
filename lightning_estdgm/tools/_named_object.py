"""`named_object`: what a user names on the command line as ``package.module:name``."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any


def named_object(what: str, path: str, kind: str = "name") -> Any:
    """Return the object ``"package.module:name"``, a `kind` of thing; modules of the working directory are found too.

    Raises:
        ValueError: if there is none; the message begins with `what`.

    """
    module_name, colon, name = path.partition(":")
    if not (module_name and colon and name):
        raise ValueError(f"{what} must be given as package.module:{kind}, got {path!r}")
    if "" not in sys.path:
        sys.path.append("")  # an installed command has its own folder there instead
    try:
        found: Any = import_module(module_name)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as e:
        raise ValueError(f"{what} {path!r} cannot be found: {e}") from e
    return found
