#!/usr/bin/env bash
# DPO over several nodes: gathers stay on NVLink (hybrid sharding), gradients are reduced across nodes.
#   sbatch --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64 recipes/slurm.sh bash recipes/dpo_multinode.sh
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-280}  # seconds that a stop has to save

srun torchrun --nnodes="$SLURM_NNODES" --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint="$HEAD:29500" \
  --rdzv_id="$SLURM_JOB_ID" dpo.py --model "${MODEL:-runs/sft}" --dataset "${PAIRS:-pairs.jsonl}" --sharding hybrid \
  --micro_batch_tokens 16384 --save_every 100 --track
