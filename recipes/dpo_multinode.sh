#!/usr/bin/env bash
#SBATCH --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64 --signal=B:TERM@300
# DPO over several nodes: gathers stay on NVLink (hybrid sharding), gradients are reduced across nodes. Slurm's
# warning signal, five minutes before the limit, makes every rank save; submit again to resume. torchrun itself may
# report the signal as an error after the ranks have saved.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600  # seconds that torchrun gives a stop to save

srun torchrun --nnodes="$SLURM_NNODES" --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint="$HEAD:29500" \
  --rdzv_id="$SLURM_JOB_ID" dpo.py --model "${MODEL:-runs/sft}" --dataset "${PAIRS:-pairs.jsonl}" --sharding hybrid \
  --micro_batch_tokens 16384 --save_every 100 --track &
trap 'kill -TERM $!; wait $!' TERM
wait $!
