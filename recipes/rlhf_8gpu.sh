#!/usr/bin/env bash
# Reward model and PPO on one node of 8 GPUs, from the SFT run of sft_chat.sh. Both steps resume when run again.
set -euo pipefail
cd "$(dirname "$0")/.."
SFT=${SFT:-runs/chat/sft}
PAIRS=${PAIRS:-allenai/llama-3.1-tulu-3-8b-preference-mixture}
PROMPTS=${PROMPTS:-allenai/RLVR-GSM}
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600  # seconds that torchrun gives a stop to save

torchrun --nproc_per_node=8 reward_model.py --model "$SFT" --dataset "$PAIRS" \
  --learning_rate 3e-6 --batch_size 128 --max_length 2048 --micro_batch_tokens 16384 --track
torchrun --nproc_per_node=8 ppo.py --model "$SFT" --reward runs/reward_model --dataset "$PROMPTS" \
  --learning_rate 1e-6 --value_learning_rate 5e-6 --rollout_size 512 --batch_size 128 --micro_batch_tokens 16384 --track
