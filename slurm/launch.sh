#!/usr/bin/env bash
# The launcher of one node of a job, for `srun --ntasks-per-node=1`: a process for each GPU runs the script that is given,
# with its settings. LAUNCH_FLAGS are for `accelerate launch`: --use_deepspeed (default), or --multi_gpu with engine=ddp.
# The exit code of the script goes to JOB_NOTES too, if that is set: srun's is one of all nodes'.
set -uo pipefail

trap '' USR1 # or it would end the launcher; the processes that train set their own handler, save and end
trap : TERM  # the launcher passes it on, and is waited for
processes=$((${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}} * SLURM_NNODES))
read -ra flags <<<"${LAUNCH_FLAGS---use_deepspeed --deepspeed_multinode_launcher standard}"
"${PYTHON:-python}" "$(dirname "$0")/../scripts/launch.py" ${flags[@]+"${flags[@]}"} --num_processes "$processes" \
    --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" --rdzv_backend static \
    --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" --mixed_precision no --dynamo_backend no "$@"
code=$?
[ -z "${JOB_NOTES:-}" ] || echo "$code" >"$JOB_NOTES/exit-$SLURM_NODEID"
exit "$code"
