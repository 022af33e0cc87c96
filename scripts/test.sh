#!/usr/bin/env bash
# Sets up what the tests need, then runs format, lint, types and tests. Arguments go to pytest: scripts/test.sh -m slow
# Without arguments three workers share the tests: one has those that start several processes, one those that wait for
# SLURM, and two cores suffice. Tests hide GPUs from themselves; those that are marked `gpu` follow, if there is one.
set -euo pipefail
source "$(dirname "$0")/setup.sh"

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1 WANDB_MODE=offline
ruff format --check .
ruff check .
mypy distill
if [ $# -gt 0 ]; then
    exec python -m pytest "$@"
fi
python -m pytest -n 3
if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    python -m pytest -m gpu
fi
