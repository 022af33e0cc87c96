#!/usr/bin/env bash
# Submits the links of a chain that are not done, each to begin once the one before it has ended well:
#     bash slurm/chain.sh chain=lightning_sdxl output_dir=runs/l "overrides=['engine=zero2']" -- --nodes=4 --gpus-per-node=8
# Before -- are settings of scripts/run_chain.py, after it options of sbatch. Submitted again, it goes on.
set -euo pipefail
cd "$(dirname "$0")/.."

settings=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    settings+=("$1")
    shift
done
[ $# -eq 0 ] || shift

links=$("${PYTHON:-python}" scripts/run_chain.py "${settings[@]}" list=true)
mkdir -p outputs/slurm
after=()
while IFS=$'\t' read -r name state _; do
    if [ "$state" = "done" ]; then
        echo "$name: done"
        continue
    fi
    job=$(sbatch --parsable --job-name="$name" --output=outputs/slurm/%x-%j.log --kill-on-invalid-dep=yes \
        ${after[@]+"${after[@]}"} "$@" slurm/link.sbatch "$name" "${settings[@]}" </dev/null)
    echo "$name: job ${job%%;*}, $state"
    after=("--dependency=afterok:${job%%;*}")
done <<<"$links"
