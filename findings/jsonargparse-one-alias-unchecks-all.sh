#!/usr/bin/env bash
# jsonargparse 4.53.0 (what LightningCLI parses with), Python >= 3.10.
#
# Found: where ONE annotation of a dataclass cannot be resolved, ALL of its fields lose their validation, without a warning.
# The annotation here is valid typing (mypy accepts it): an alias, defined in another module, that holds a quoted forward
# reference to a class of that module. A text is then taken for `n: int`, and reaches the dataclass as a str.
# Expected: an error or a warning that names the annotation, or the other fields checked as before, as for a plain class
# with the same __init__.
# Seen: "int field got: 'many' (str)". Without the quotes in the alias: an error about `n`.
# The cause is said only with JSONARGPARSE_DEBUG=true.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'jsonargparse[signatures]==4.53.0'
cd "$folder"

cat > rules.py << 'PY'
from collections.abc import Callable

class Budget:
    """A class that an alias names before anybody imports it elsewhere."""

QUOTED = Callable[[int], "list[Budget]"]
PLAIN = Callable[[int], list[Budget]]
PY

cat > settings.py << 'PY'
from __future__ import annotations
import sys
from dataclasses import dataclass
from jsonargparse import ArgumentParser
from rules import PLAIN, QUOTED

@dataclass(frozen=True)
class Quoted:
    n: int = 1
    rule: str | QUOTED | None = None

@dataclass(frozen=True)
class Plain:
    n: int = 1
    rule: str | PLAIN | None = None

def parsed(cls):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "settings")
    try:
        value = parser.parse_args(["--settings.n=many"]).settings.n
    except Exception as error:
        return f"refused ({type(error).__name__})"
    return f"got: {value!r} ({type(value).__name__})"

quoted, plain = parsed(Quoted), parsed(Plain)
print("int field", quoted)
print("without the quotes", plain)
sys.exit(0 if quoted == "got: 'many' (str)" and plain.startswith("refused") else 1)
PY

"$folder/venv/bin/python" -W error settings.py
