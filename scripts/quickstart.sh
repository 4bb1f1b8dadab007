#!/usr/bin/env bash
# From nothing to a trained recurrent language model in a few minutes on a CPU: install, prepare the embedded corpus (the
# Python standard library's own source), train a small hybrid (3 Gated DeltaNet : 1 sliding attention), evaluate it on
# held-out files beside gzip and xz, generate, draw the loss curve. Needs no network but the package index.
#   RUN=runs/mine STEPS=100 bash scripts/quickstart.sh     other folder, shorter run
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_environment.sh

CORPUS=${CORPUS:-corpora/stdlib-bpe}
RUN=${RUN:-runs/quickstart}
STEPS=${STEPS:-2000}

step() { printf '\n== %s (%d s since start)\n' "$1" "$SECONDS"; }

step "prepare the corpus"
seqjax prepare stdlib --out "$CORPUS" --train-bpe 4096

step "train"
seqjax train hybrid-tiny --data "$CORPUS" --run "$RUN" --steps "$STEPS" --batch-size 4 --window 256 --learning-rate 4e-3 --resume auto

step "evaluate on held-out files"
seqjax evaluate "$RUN" --data "$CORPUS" --split test --compare-compressors

step "generate"
seqjax generate "$RUN" --prompt "def read_" --max-new-tokens 120 --temperature 0.7 --seed 1

step "done: curve in $RUN/loss.png, metrics in $RUN/metrics.jsonl"
