#!/usr/bin/env bash
# SFT of a base model on chat data, in the settings of NeMo-Aligner's tutorial: batch 128, 5e-6, 4096 tokens, one epoch.
# Run again, it goes on where it was. NPROC: GPUs of a node. SMOKE=1: the toy world, two steps on a CPU.
#   sbatch --nodes=1 --gpus-per-node=8 --time=4:00:00 recipes/slurm.sh bash recipes/sft_chat.sh
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-meta-llama/Llama-3.1-8B}
DATA=${DATA:-trl-lib/Capybara}  # databricks/databricks-dolly-15k is the tutorial's other one
OUT=${OUT:-runs/chat}
run=(torchrun --nproc_per_node="${NPROC:-8}")
sources=(--model "$MODEL" --chat_template "${TEMPLATE:-chatml}" --dataset "$DATA" --track)
small=()
if [ "${SMOKE:-}" ]; then
  run=(python)
  sources=()
  small=(--batch_size 8 --max_steps 2 --num_samples 2 --micro_batch_tokens 2048)
fi
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600  # seconds that torchrun gives a stop to save

"${run[@]}" sft.py "${sources[@]}" --learning_rate 5e-6 --lr_schedule cosine --warmup_steps 10 --weight_decay 0.01 \
  --batch_size 128 --max_length 4096 --num_epochs 1 --micro_batch_tokens 16384 --output_dir "$OUT/sft" "${small[@]}"
