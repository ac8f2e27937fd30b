#!/usr/bin/env bash
# zeus 0.16.0, on a stand-in for the RAPL files of a laptop: the zone package-0, and psys beside it.
#
# Found: psys, which holds the whole package, is listed as a second CPU. `cpu_energy` of a window has both, so that its sum, the
# obvious figure for the machine's CPUs, counts the package twice. Nothing in the result tells a CPU from psys.
# Expected: one CPU, as the machine has; psys apart, or left out.
# Seen: "{0: 10.0, 1: 25.0}" where the package took 10 J, and the whole machine 25 J.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'zeus==0.16.0'
cd "$folder"

cat > window.py << 'PY'
from pathlib import Path

import zeus.device.cpu.rapl as rapl
from zeus.monitor import ZeusMonitor

if __name__ == "__main__":
    tree = Path("powercap").absolute()
    rapl.RAPL_DIR = str(tree)
    for number, name in enumerate(("package-0", "psys")):
        zone = tree / f"intel-rapl:{number}"
        zone.mkdir(parents=True)
        (zone / "name").write_text(f"{name}\n")
        (zone / "max_energy_range_uj").write_text("262143328850\n")
        (zone / "energy_uj").write_text("1000000\n")
    monitor = ZeusMonitor(gpu_indices=[])
    monitor.begin_window("training")
    (tree / "intel-rapl:0" / "energy_uj").write_text("11000000\n")
    (tree / "intel-rapl:1" / "energy_uj").write_text("26000000\n")
    print(monitor.end_window("training").cpu_energy)
PY
seen=$(venv/bin/python -W ignore window.py 2> /dev/null)
echo "$seen"
[ "$seen" = "{0: 10.0, 1: 25.0}" ] || { echo "changed"; exit 1; }
