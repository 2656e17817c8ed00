#!/usr/bin/env bash
# SFT and then DPO of an 8B model on one node of 8 GPUs. Both steps resume where they stopped when run again.
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-meta-llama/Llama-3.1-8B}
DEMONSTRATIONS=${DEMONSTRATIONS:-allenai/tulu-3-sft-mixture}
PAIRS=${PAIRS:-allenai/llama-3.1-tulu-3-8b-preference-mixture}
TEMPLATE=${TEMPLATE:-chatml}
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600  # seconds that torchrun gives a stop to save

torchrun --nproc_per_node=8 sft.py --model "$MODEL" --chat_template "$TEMPLATE" --dataset "$DEMONSTRATIONS" \
  --learning_rate 5e-6 --batch_size 128 --num_epochs 2 --max_length 4096 --micro_batch_tokens 16384 --track
torchrun --nproc_per_node=8 dpo.py --model runs/sft --dataset "$PAIRS" \
  --learning_rate 5e-7 --beta 0.1 --batch_size 128 --max_length 2048 --micro_batch_tokens 16384 --track
