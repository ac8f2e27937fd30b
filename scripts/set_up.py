"""Sets up .venv for the Makefile and says what it does: python3 scripts/set_up.py TARGET TORCH [EXTRA...].

With uv, which is several times as fast: that on the PATH, else one that pip puts into .venv. With pip where uv cannot.
Needs nothing but Python.
"""

from __future__ import annotations

import ast
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
    "find-links": "UV_FIND_LINKS",
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "constraint": "UV_CONSTRAINT",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
}
"""What pip is told by its files and by the environment, uv is told as well: settings of pip, variables of uv."""


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
    told = pip_settings()
    given = {
        variable: ("," if name == "find-links" else " ").join(told[name])
        for name, variable in UV_FROM_PIP.items()
        if name in told
    }
    # As pip does it: the best version of all indexes, not of the first that knows the package.
    environment = {"UV_INDEX_STRATEGY": "unsafe-best-match", **given}
    environment = {name: value for name, value in environment.items() if name not in os.environ}
    make = [program, "venv", "--seed", "--allow-existing", "--python", sys.executable, str(VENV)]
    return Installer("uv", make, [program, "pip", "install", "--python", str(PYTHON)], environment)


def pip_settings() -> dict[str, list[str]]:
    """Return what pip is told for installing, in files and by the environment: values by setting; none without pip."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found = re.findall(r"^(global|install|:env:)\.(\S+?)=('.*'|\".*\")$", listed, re.MULTILINE)
    by_weight = sorted(found, key=lambda row: ["global", "install", ":env:"].index(row[0]))
    return {name: ast.literal_eval(values).split() for _, name, values in by_weight}


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


def make(installer: Installer) -> bool:
    """Make the environment where there is none that works; return whether there is one now."""
    if PYTHON.exists() and subprocess.run([PYTHON, "-c", ""], check=False).returncode == 0:
        return True
    return run(f"An environment in .venv, by {installer.name}", installer, installer.make)


def set_up(installer: Installer, torch: str, package: str) -> bool:
    """Make the environment, then install torch and the package in one go; return whether all of it succeeded."""
    title = f"PyTorch ({torch}), this package and what it needs ({package}), by {installer.name}"
    return make(installer) and run(title, installer, [*installer.install, torch, "--editable", package])


def find_uv() -> str | None:
    """Return uv's program: that on the PATH, else one that pip puts into the environment; None where it cannot."""
    if found := shutil.which("uv"):
        return found
    program, by_pip = PYTHON.with_name("uv"), pip()
    if make(by_pip) and (program.exists() or run("uv, which installs faster, by pip", by_pip, [*by_pip.install, "uv"])):
        return str(program)
    return None


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


def main(target: str, torch: str, *extras: str) -> int:
    """Set up what a target needs; return the exit status."""
    package = f".[{','.join(extras)}]" if extras else "."
    say(f"Setting up .venv for `make {target}`: once, and again only after pyproject.toml changes.")
    if program := find_uv():
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
