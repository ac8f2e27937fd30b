#!/usr/bin/env bash
# lightning 2.6.6, CometLogger, with comet_ml 3.58.8.
#
# Found: a run of `CometLogger(online=False, offline_directory=DIR)` keeps nothing. The logger makes an OfflineExperiment, but
# adds `disabled=True` to its configuration wherever `online` is False. Nothing is said, and DIR stays empty.
# Expected: an archive in DIR, as the logger documents of `online=False` and as `comet_ml.OfflineExperiment` leaves.
# Seen: "by CometLogger: OfflineExperiment, disabled, 0 archives; by comet_ml: OfflineExperiment, enabled, 1 archives".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'torch==2.13.0' 'numpy==2.2.6' 'lightning==2.6.6' 'comet_ml==3.58.8'
cd "$folder"

venv/bin/python - << 'PY' 2>log.txt || { cat log.txt; exit 1; }
import sys
from pathlib import Path

import comet_ml
from lightning.pytorch.loggers import CometLogger


def outcome(experiment, folder):
    for step in range(3):
        experiment.log_metric("loss", 1.0 / (step + 1), step=step)
    experiment.end()
    state = "disabled" if experiment.disabled else "enabled"
    return f"{type(experiment).__name__}, {state}, {len(list(Path(folder).glob('*.zip')))} archives"


for folder in ("logger", "plain"):
    Path(folder).mkdir()
by_logger = outcome(CometLogger(online=False, offline_directory="logger", project="p").experiment, "logger")
by_comet = outcome(comet_ml.OfflineExperiment(offline_directory="plain", project_name="p"), "plain")
seen = f"by CometLogger: {by_logger}; by comet_ml: {by_comet}"
print(seen)
expected = (
    "by CometLogger: OfflineExperiment, disabled, 0 archives; by comet_ml: OfflineExperiment, enabled, 1 archives"
)
sys.exit(0 if seen == expected else f"changed; expected {expected}")
PY
