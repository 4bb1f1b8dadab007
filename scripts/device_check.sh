#!/usr/bin/env bash
# On a machine with a GPU or a TPU: are the kernels right there, and how fast are they? Under nine minutes.
#   bash scripts/device_check.sh                            both; results to experiments/benchmarks/DEVICE/kernels.json
#   bash scripts/device_check.sh --budget-s 300             no benchmark cell is begun after so many seconds
#   bash scripts/device_check.sh --filter delta_rule        other options go to `seqjax bench kernels`
# An environment whose jax already sees the accelerator (PYTHON, default python3) is used as it is, and needs no network; otherwise one is made as in
# scripts/test.sh, with the extra that fits the machine. flash-linear-attention is timed where it is installed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
budget=480
options=()
while [ $# -gt 0 ]; do
    case $1 in
        --budget-s) budget=${2:?--budget-s needs a number of seconds}; shift 2 ;;
        *) options+=("$1"); shift ;;
    esac
done

# Tests run side by side, and torch shares the device: nobody takes its memory beforehand.
export XLA_PYTHON_CLIENT_PREALLOCATE=false
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
interpreter=${PYTHON:-python3}
probe='import re, jax; assert jax.default_backend() != "cpu"; print(re.sub(r"[^a-z0-9]+", "-", jax.devices()[0].device_kind.lower()).strip("-"))'
packages='import flax, tyro, pytest'
if ! { "$interpreter" -c "$packages" && device=$("$interpreter" -c "$probe"); } 2>/dev/null; then
    if [ -z "${EXTRAS:-}" ]; then
        if command -v nvidia-smi >/dev/null; then EXTRAS=test,cuda13; else EXTRAS=test,tpu; fi
    fi
    # The GPU kernels need the newest jax, and that a Python >= 3.12.
    if [ -z "${PYTHON:-}" ] && command -v python3.12 >/dev/null; then PYTHON=python3.12; fi
    VENV=${VENV:-.venv-device}
    source scripts/_environment.sh || exit 1
    interpreter=python
    device=$("$interpreter" -c "$probe") || { echo "device_check: jax sees no GPU and no TPU" >&2; exit 1; }
fi
echo "== $device, $("$interpreter" -c 'import jax, sys; print("jax", jax.__version__, "python", sys.version.split()[0])')"

status=0
echo "== results"
parallel=()
# One process per TPU; a GPU is shared, and most of the time goes into compilation.
if [[ $device != tpu* ]] && "$interpreter" -c 'import xdist' 2>/dev/null; then parallel=(--numprocesses 4); fi
"$interpreter" -m pytest -m device tests/device "${parallel[@]}" || status=1

echo "== times"
left=$((budget > SECONDS ? budget - SECONDS : 1))
"$interpreter" -m seqjax bench kernels --strict --budget-s "$left" --out "experiments/benchmarks/$device/kernels.json" "${options[@]}" || status=1
"$interpreter" experiments/benchmarks/table.py || status=1
echo "== $SECONDS s"
exit $status
