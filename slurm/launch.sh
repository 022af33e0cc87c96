#!/usr/bin/env bash
# The processes of one node of a job, for `srun --ntasks-per-node=1 bash slurm/launch.sh train SETTINGS`.
exec "${PYTHON:-python}" -m distill.cluster.node "$@"
