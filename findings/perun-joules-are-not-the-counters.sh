#!/usr/bin/env bash
# perun 1.0.0 (Helmholtz AI), on samples of an energy counter in microjoules, as RAPL's zones give them.
#
# Found: the energy of a run is not the counter's last value less its first. The counter is made into power by differences, the first
# power is put before them once more, and the series is integrated by trapezoids: the first interval counts one and a half times, the
# last one half. The mean power is of the series with that repeated value, so that it times the duration is a third figure.
# A run that is sampled each second, and ends idle, is charged with half a second of its first power for nothing.
# Expected: 900 J, and 225 W over the 4 seconds.
# Seen: "1050 J, 240 W" for a counter of 0, 300, 600, 900 and 900 J.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'perun==1.0.0'
cd "$folder"

cat > energy.py << 'PY'
import numpy as np
from perun.data_model.data import RawData
from perun.data_model.measurement_type import Magnitude, MetricMetaData, Unit
from perun.processing import processEnergyData


def about(unit, magnitude, dtype, highest):
    kind = np.dtype(dtype)
    return MetricMetaData(unit, magnitude, kind, kind.type(0), kind.type(highest), kind.type(highest))


counter = np.array([0, 300, 600, 900, 900], dtype="uint64") * 1_000_000
samples = RawData(
    np.arange(5.0),
    counter,
    about(Unit.SECOND, Magnitude.ONE, "float32", 1e9),
    about(Unit.JOULE, Magnitude.MICRO, "uint64", 262143328850),
)
joules, watts = processEnergyData(samples)
print(f"{joules:.0f} J, {watts:.0f} W")
PY
seen=$(venv/bin/python -W ignore energy.py)
echo "$seen"
[ "$seen" = "1050 J, 240 W" ] || { echo "changed"; exit 1; }
