#!/usr/bin/env bash
# From nothing to a distilled LoRA: sets up, writes a trajectory store from the bundled toy teacher, distils an LCM-LoRA
# from it, exports, judges and draws it. Run again, it skips what is finished; killed and run again, it goes on.
set -euo pipefail
source "$(dirname "$0")/setup.sh"

out=outputs/quickstart
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -gt 0 ]; then
    processes=$gpus
    while [ $((128 % processes)) -ne 0 ]; do processes=$((processes - 1)); done # the batch of 128 is dealt out evenly
else
    processes=2
    export ACCELERATE_USE_CPU=true OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
fi
launch() { python scripts/launch.py --num_processes "$processes" "$@"; }

echo "== 1/4 teacher trajectories -> $out/store"
launch scripts/make_trajectories.py experiment=quickstart
echo "== 2/4 LCM-LoRA, $processes processes, DeepSpeed ZeRO-2 -> $out/run"
launch --use_deepspeed scripts/train.py experiment=quickstart
echo "== 3/4 the LoRA as files -> $out/lora"
python scripts/export.py run=$out/run output_dir=$out/lora
echo "== 4/4 student and teacher judged -> $out/report/index.html"
[ "$gpus" -gt 0 ] || export OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive
python scripts/evaluate.py student=$out/run output_dir=$out "steps=[1,2,4]" n=400 protocol.tuning_n=200
