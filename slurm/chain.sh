#!/usr/bin/env bash
# An earlier way to submit a chain; it types the new one: `distill submit chain=NAME SETTINGS slurm.nodes=4 …`.
#     bash slurm/chain.sh chain=lightning_sdxl output_dir=runs/l "overrides=['engine=zero2']" -- --nodes=4 --gpus-per-node=8
set -euo pipefail

settings=() others=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do settings+=("$1") && shift; done
for option in "${@:2}"; do
    key=${option%%=*}
    case $option in
        --nodes=* | --gpus-per-node=* | --cpus-per-task=* | --mem=* | --time=* | --partition=* | --account=*)
            key=${key#--} && settings+=("slurm.${key//-/_}=${option#*=}") ;;
        *) others+=("'$option'") ;;
    esac
done
[ ${#others[@]} -eq 0 ] || settings+=("slurm.options=[$(IFS=, && echo "${others[*]}")]")
[ -z "${ARRAY:-}" ] || settings+=("slurm.array=$ARRAY")
[ -z "${LAUNCH_FLAGS:-}" ] || settings+=("slurm.launch_flags=[${LAUNCH_FLAGS// /,}]")
set -x
exec "${PYTHON:-python}" -m distill submit "${settings[@]}"
