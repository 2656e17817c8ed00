#!/usr/bin/env bash
# The classic pipeline on HH-RLHF: SFT on the chosen replies, a reward model on the pairs, PPO on their prompts; an 8B
# model on one node of 8 GPUs. Each step resumes when run again. SMOKE=1: the toy model, a few steps on a CPU.
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-meta-llama/Llama-3.1-8B}
HH=${HH:-Anthropic/hh-rlhf}
OUT=${OUT:-runs/hh}
run=(torchrun --nproc_per_node="${NPROC:-8}")
template=(--chat_template chatml)
small=() smaller=()
if [ "${SMOKE:-}" ]; then
  run=(python)
  MODEL=toy HH=${SMOKE_DATA:-toy} template=()
  small=(--batch_size 8 --max_steps 2 --eval_every 2 --micro_batch_tokens 2048)
  smaller=("${small[@]}" --rollout_size 8 --max_new_tokens 16)
fi
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600  # seconds that torchrun gives a stop to save

"${run[@]}" sft.py --model "$MODEL" "${template[@]}" --dataset "$HH" --learning_rate 5e-6 --batch_size 128 \
  --max_length 2048 --micro_batch_tokens 16384 --output_dir "$OUT/sft" "${small[@]}"
"${run[@]}" reward_model.py --model "$OUT/sft" --dataset "$HH" --learning_rate 3e-6 --batch_size 128 \
  --max_length 2048 --micro_batch_tokens 16384 --output_dir "$OUT/reward_model" "${small[@]}"
"${run[@]}" ppo.py --model "$OUT/sft" --reward "$OUT/reward_model" --dataset "$HH" --learning_rate 1e-6 \
  --value_learning_rate 5e-6 --rollout_size 512 --batch_size 128 --micro_batch_tokens 16384 \
  --output_dir "$OUT/ppo" "${smaller[@]}"
