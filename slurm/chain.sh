#!/usr/bin/env bash
# Submits the links of a chain that are not done, each to begin once the one before it has ended well:
#     bash slurm/chain.sh chain=lightning_sdxl output_dir=runs/l "overrides=['engine=zero2']" -- --nodes=4 --gpus-per-node=8
# Before -- are settings of scripts/run_chain.py, after it options of sbatch. ARRAY=16 makes so many jobs of a link that
# writes a store; one that only looks at what was made takes one node. Submitted again, it goes on. Logs and notes
# are in OUTPUT_DIR/slurm.
set -euo pipefail
cd "$(dirname "$0")/.."

settings=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    settings+=("$1")
    shift
done
[ $# -eq 0 ] || shift

run_chain() { "${PYTHON:-python}" scripts/run_chain.py "${settings[@]}" "$@"; }
links=$(run_chain list=commands)
notes=$(run_chain --cfg | sed -n 's/^output_dir: //p')/slurm
mkdir -p "$notes"
after=()
while IFS=$'\t' read -r name state script _; do
    if [ "$state" = "done" ]; then
        echo "$name: done"
        continue
    fi
    shape=(--output="$notes/%x-%j.log")
    case $script in
        train) ;;
        make_trajectories) [ -z "${ARRAY:-}" ] || shape=(--output="$notes/%x-%A-%a.log" --array="0-$((ARRAY - 1))") ;;
        *) shape+=(--nodes=1) ;;
    esac
    job=$(sbatch --parsable --job-name="$name" --kill-on-invalid-dep=yes ${after[@]+"${after[@]}"} "$@" "${shape[@]}" \
        slurm/link.sbatch "$notes" "$name" "${settings[@]}" </dev/null)
    echo "$name: job ${job%%;*}, $state"
    after=("--dependency=afterok:${job%%;*}")
done <<<"$links"
