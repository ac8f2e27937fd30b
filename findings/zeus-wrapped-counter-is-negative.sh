#!/usr/bin/env bash
# zeus 0.16.0, on a stand-in for one RAPL zone, whose counter passes its end.
#
# Found: a process beside the program looks for wrapped counters once a second, and only ten times a second where less than 100 J are
# left. A window that ends before it has looked has negative joules, as many as the counter's whole range. The next window
# has that range too much, though nothing was used in it. Neither says anything. A CPU that draws more than 100 W wraps like that.
# Expected: 151 J and 0 J: a counter that went back within a window has wrapped, and its range is known.
# Seen: "-261992.32885 262143.32885".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'zeus==0.16.0'
cd "$folder"

cat > windows.py << 'PY'
import time
from pathlib import Path

import zeus.device.cpu.rapl as rapl
from zeus.monitor import ZeusMonitor

if __name__ == "__main__":
    tree = Path("powercap").absolute()
    rapl.RAPL_DIR = str(tree)
    zone = tree / "intel-rapl:0"
    zone.mkdir(parents=True)
    (zone / "name").write_text("package-0\n")
    (zone / "max_energy_range_uj").write_text("262143328850\n")
    (zone / "energy_uj").write_text("262042328850\n")  # 101 J before its end
    monitor = ZeusMonitor(gpu_indices=[])
    monitor.begin_window("long before")
    time.sleep(20)  # until the process beside it looks at the counter
    monitor.end_window("long before")
    monitor.begin_window("wrapped")
    (zone / "energy_uj").write_text("50000000\n")
    wrapped = monitor.end_window("wrapped").cpu_energy[0]
    monitor.begin_window("nothing used")
    time.sleep(3)
    print(f"{wrapped:.5f} {monitor.end_window('nothing used').cpu_energy[0]:.5f}")
PY
seen=$(venv/bin/python -W ignore windows.py 2> /dev/null)
echo "$seen"
[ "$seen" = "-261992.32885 262143.32885" ] || { echo "changed"; exit 1; }
