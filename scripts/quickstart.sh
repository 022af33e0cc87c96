#!/usr/bin/env bash
# From nothing to a distilled LoRA: sets up, then runs `distill quickstart`, which distils the bundled toy teacher and says
# of itself what it does. Run again, it skips what is finished; killed and run again, it resumes. Settings are handed on:
# scripts/quickstart.sh output_dir=outputs/try 'overrides=[max_train_steps=50]'
set -euo pipefail
source "$(dirname "$0")/setup.sh"
exec python -m distill quickstart "$@"
