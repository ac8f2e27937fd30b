#!/usr/bin/env bash
# jsonargparse 4.53.0, an argument of type dict[str, dict[str, int]] whose items are given one by one.
#
# Found: items of the outer dict add up on the command line, items of an inner one do not: of `--o.a.x 1 --o.a.y 2` only y is left,
# and nothing is said. So a second setting of one group takes the first one back.
# Expected: {'a': {'x': 1, 'y': 2}}, as `--o.x 1 --o.y 2` gives {'x': 1, 'y': 2} for a dict of one level, and as dataclasses do.
# Seen: "one level {'x': 1, 'y': 2}; two levels {'a': {'y': 2}}; a dataclass {'x': 1, 'y': 2}".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'jsonargparse==4.53.0'
cd "$folder"

seen=$("$folder/venv/bin/python" -c '
from dataclasses import dataclass

from jsonargparse import ArgumentParser


@dataclass
class Group:
    x: int = 0
    y: int = 0


def parsed(kind, *given):
    parser = ArgumentParser()
    parser.add_argument("--o", type=kind, default={})
    return parser.parse_args(given).as_dict()["o"]


one = parsed(dict[str, int], "--o.x", "1", "--o.y", "2")
two = parsed(dict[str, dict[str, int]], "--o.a.x", "1", "--o.a.y", "2")
print(f"one level {one}; two levels {two}; a dataclass", parsed(Group, "--o.x", "1", "--o.y", "2"))
')
echo "$seen"
[ "$seen" = "one level {'x': 1, 'y': 2}; two levels {'a': {'y': 2}}; a dataclass {'x': 1, 'y': 2}" ]
