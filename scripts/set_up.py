"""Sets up .venv for the Makefile and says what it does: python3 scripts/set_up.py TARGET TORCH [EXTRA...].

With uv where it is on the PATH, and with pip where it is not, or where uv cannot. Needs nothing but Python.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

VENV = Path(".venv")
PYTHON = VENV / "bin" / "python"
EVERY_S = 5.0
"""Seconds between two lines while an installer says nothing."""

UV_FROM_PIP = {
    "PIP_FIND_LINKS": "UV_FIND_LINKS",
    "PIP_INDEX_URL": "UV_DEFAULT_INDEX",
    "PIP_EXTRA_INDEX_URL": "UV_INDEX",
    "PIP_CERT": "SSL_CERT_FILE",
}
"""What pip is told by the environment, uv is told as well."""


@dataclass(frozen=True)
class Installer:
    """A program that makes an environment and installs into it.

    Attributes:
        name: its name.
        make: command that makes .venv.
        install: command that installs into it, without what.
        environment: variables that it needs beside those that are set.
    """

    name: str
    make: Sequence[str]
    install: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


def pip() -> Installer:
    """Return pip. Modules are compiled when they are first imported: most of torch's never are."""
    quiet = ["--no-input", "--disable-pip-version-check", "--progress-bar=off", "--no-compile"]
    install = [str(PYTHON), "-m", "pip", "install", *quiet]
    return Installer("pip", [sys.executable, "-m", "venv", str(VENV)], install, {"PIP_ROOT_USER_ACTION": "ignore"})


def uv(program: str) -> Installer:
    """Return uv. Its environment has pip as well, for whoever expects one."""
    given = {theirs: os.environ[ours] for ours, theirs in UV_FROM_PIP.items() if ours in os.environ}
    environment = {name: value for name, value in given.items() if name not in os.environ}
    make = [program, "venv", "--seed", "--allow-existing", "--python", sys.executable, str(VENV)]
    return Installer("uv", make, [program, "pip", "install", "--python", str(PYTHON)], environment)


def run(title: str, installer: Installer, command: Sequence[str]) -> bool:
    """Run a command and say how far it is: at once, every few seconds, and in the end; return whether it succeeded."""
    say(f"{title} ...")
    began = time.monotonic()
    lines: queue.Queue[str | None] = queue.Queue()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, **installer.environment},
    )

    def read() -> None:
        assert process.stdout is not None
        with process.stdout as output:
            for text in output:
                lines.put(text.rstrip())
        lines.put(None)  # the end, so that nobody waits for it

    threading.Thread(target=read, daemon=True).start()
    said: list[str] = []
    line: str | None = ""
    now, due = "", began + EVERY_S
    while line is not None:
        with contextlib.suppress(queue.Empty):
            line = lines.get(timeout=max(0.05, due - time.monotonic()))
            said.append(line or "")
            now = in_words(line or "") or now
        if line is not None and time.monotonic() >= due:
            say(f"    {time.monotonic() - began:.0f} s{now and ': '}{now}")
            due += EVERY_S
    if process.wait() == 0:
        say(f"    done in {time.monotonic() - began:.0f} s")
        return True
    print("\n".join(said[-40:]), file=sys.stderr, flush=True)
    return False


def in_words(line: str) -> str:
    """Return what an installer's line says of its progress; empty for any other line.

    >>> in_words("Collecting torch==2.13.0"), in_words("  Downloading a-1.whl (2 MB)"), in_words("WARNING: a")
    ('looking for torch==2.13.0', 'downloading a-1.whl (2 MB)', '')
    >>> in_words("Installing collected packages: mpmath, torch")
    'unpacking 2 packages: mpmath, torch'
    """
    if found := re.match(r"\s*Collecting (\S+)", line):
        return f"looking for {found[1]}"
    if found := re.match(r"\s*Downloading (.+)", line):
        return f"downloading {found[1]}"
    if found := re.match(r"Installing collected packages: (.+)", line):
        names = found[1].split(", ")
        return f"unpacking {len(names)} packages: {', '.join(names[-3:])}"
    return ""


def set_up(installer: Installer, torch: str, package: str) -> bool:
    """Make the environment, then install torch, then the package; return whether all of it succeeded."""
    stages = [
        ("an environment in .venv", installer.make),
        (f"PyTorch ({torch}), the largest part", [*installer.install, torch]),
        (f"this package and what it needs ({package})", [*installer.install, "--editable", package]),
    ]
    if PYTHON.exists() and subprocess.run([PYTHON, "-c", ""], check=False).returncode == 0:
        del stages[0]
    return all(
        run(f"[{number} of {len(stages)}] {what}, by {installer.name}", installer, command)
        for number, (what, command) in enumerate(stages, 1)
    )


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


def main(target: str, torch: str, *extras: str) -> int:
    """Set up what a target needs; return the exit status."""
    package = f".[{','.join(extras)}]" if extras else "."
    say(f"Setting up .venv for `make {target}`: once, and again only after pyproject.toml changes.")
    program = shutil.which("uv")
    if program is not None:
        if set_up(uv(program), torch, package):
            return 0
        say("uv could not do that (see above): going on with pip.")
        if PYTHON.exists() and subprocess.run([PYTHON, "-m", "pip", "--version"], check=False).returncode != 0:
            shutil.rmtree(VENV)
    if set_up(pip(), torch, package):
        return 0
    say("Setting up .venv failed; what the installer said last stands above. `make clean` starts afresh.")
    return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
