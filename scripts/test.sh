#!/usr/bin/env bash
# Set up (once) and run the checks: lint, format, types, then the tests. Extra arguments go to pytest:
#   bash scripts/test.sh                       everything in the default tier
#   bash scripts/test.sh -m slow               another tier (slow, compile, parity, device; BUILD.md)
#   PYTHON=python3.12 VENV=.venv312 bash scripts/test.sh tests/laws
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
EXTRAS=${EXTRAS:-test}
source scripts/_environment.sh

echo "== ruff"
ruff check .
ruff format --check .
echo "== ty"
ty check seqjax pallas_kernels
echo "== pytest"
# One process per core: most of the time goes into XLA compilation, which is single-threaded. A file stays in one process,
# so that its compiled functions are shared.
exec python -m pytest --numprocesses "${TEST_PROCESSES:-2}" --dist loadfile --durations 15 "$@"
