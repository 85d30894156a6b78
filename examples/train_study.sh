#!/usr/bin/env bash
# How deep and how wide should a draft be? (2402.01528: its latency follows its depth, not its width.)
#
# Trains drafts of several depths, and one shallow draft as wide as it takes to have the parameters of a deep one, on
# the same text for the same time. Interrupted, the same command goes on where it stopped.
#
#   examples/train_study.sh smollm2-135m runs/four/text runs/study 60
#
# Arguments: MODEL, folder of training text (`paceline train draft` wrote it), folder for the runs, seconds of training
# for each draft. The layer counts and the width are those for a target of 30 layers with hidden size 576 (SmolLM2-135M):
# 6 layers with 6320 neurons have 70.84 million parameters, 20 layers with 1536 have 70.80 million. DRAFTS changes them.
set -euo pipefail
model=$1 text=$2 out=$3 seconds=$4
drafts=${DRAFTS:-"20 12 6 6x6320"}

for draft in $drafts; do
    layers=${draft%x*}
    wide=()
    [[ $draft == *x* ]] && wide=(--intermediate "${draft#*x}")
    paceline train draft "$model" --out "$out/$draft" --text "$text" --layers "$layers" "${wide[@]}" \
        --seconds "$seconds" --lr "${LR:-0.0005}" --save-every 2000
done

echo "draft parameters held-out-loss acceptance-T1 acceptance-T0"
for draft in $drafts; do
    python - "$draft" "$out/$draft/draft/draft.json" <<'PYTHON'
import json, sys
made = json.load(open(sys.argv[2]))
held = made["heldout"]
print(sys.argv[1], made["parameters"], *(f"{held[key]:.3f}" for key in ("loss", "acceptance", "agreement")))
PYTHON
done
