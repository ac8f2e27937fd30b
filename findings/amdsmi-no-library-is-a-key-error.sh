#!/usr/bin/env bash
# amdsmi 7.0.2, on a machine without AMD's libamd_smi.so.
#
# Found: `import amdsmi` prints two lines to standard output and then raises a KeyError. So `try: import amdsmi` with
# `except ImportError` ends the program there, and one that prints JSON prints two lines before it. It is no rare case: Zeus 0.16.0
# asks for amdsmi on every machine, also on those with NVIDIA GPUs or none.
# Expected: an ImportError or the OSError of the missing library, and nothing printed. The wrapper catches that OSError, prints it,
# and goes on to look the library up.
# Seen: "KeyError: 'libamd_smi.so'; 2 lines on standard output, 0 on standard error".
set -euo pipefail
if ldconfig -p 2> /dev/null | grep -q libamd_smi || [ -e "${ROCM_HOME:-${ROCM_PATH:-/opt/rocm}}/lib/libamd_smi.so" ]; then
    echo "needs a machine without libamd_smi.so"
    exit 1
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'amdsmi==7.0.2'
cd "$folder"

"$folder/venv/bin/python" > out 2> err -c '
try:
    import amdsmi
except Exception as error:
    kind = f"{type(error).__name__}: {error}"
else:
    kind = "imported"
open("kind", "w").write(kind)
'
seen="$(cat kind); $(wc -l < out) lines on standard output, $(wc -l < err) on standard error"
echo "$seen"
[ "$seen" = "KeyError: 'libamd_smi.so'; 2 lines on standard output, 0 on standard error" ]
