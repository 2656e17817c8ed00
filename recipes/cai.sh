#!/usr/bin/env bash
# Constitutional AI of a 7B model on one node of 8 GPUs, in the steps of NeMo-Aligner's tutorial: a helpful model
# answers, criticises and revises; SFT; feedback of a judge; preference model; PPO. Run again, it goes on where it was.
# A judge behind a server: JUDGE="--judge_url https://host/v1 --judge_model name". SMOKE=1: the toy world, on a CPU.
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-mistralai/Mistral-7B-v0.1}
SPEAKER=${SPEAKER:-mistralai/Mistral-7B-Instruct-v0.3}
HH=${HH:-Anthropic/hh-rlhf}
JUDGE=${JUDGE:---judge_model $SPEAKER}
run=(torchrun --nproc_per_node="${NPROC:-8}")
models=(--model "$MODEL" --chat_template chatml --helpful_model "$SPEAKER" $JUDGE)
sources=(--dataset "$HH:data_dir=red-team-attempts" --helpful_demonstrations "$HH:data_dir=helpful-base"
  --helpful_pairs "$HH:data_dir=helpful-base" --helpful_prompts "$HH:data_dir=helpful-base")
small=()
if [ "${SMOKE:-}" ]; then
  run=(python)
  models=() sources=()
  short="--batch_size 8 --max_steps 2 --eval_every 2"
  small=(--num_red_team 24 --num_samples 4 --max_new_tokens 24 --sft "$short" --reward_model "$short"
    --ppo "$short --rollout_size 8 --max_new_tokens 16")
fi
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600  # seconds that torchrun gives a stop to save

"${run[@]}" cai.py "${models[@]}" "${sources[@]}" --num_red_team 10000 --num_revisions 1 --temperature 0.7 \
  --repetition_penalty 1.2 --max_new_tokens 1024 --sft "--learning_rate 1e-6 --batch_size 128 --max_length 4096" \
  --reward_model "--learning_rate 3e-6 --batch_size 512 --max_length 4096" \
  --ppo "--learning_rate 9e-8 --value_learning_rate 3e-7 --kl_coef 0.02" --output_dir "${OUT:-runs/cai}" "${small[@]}"
