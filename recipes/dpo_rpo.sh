#!/usr/bin/env bash
# DPO, and reward-aware RPO on the same pairs, of an SFT model, in the settings of NeMo-Aligner's guide: batch 512,
# beta 0.1, 9e-7 with a cosine, one epoch. Run again, it goes on where it was. NPROC: GPUs of a node. SMOKE=1: the toy
# world, two steps on a CPU.
#   sbatch --nodes=1 --gpus-per-node=8 --time=4:00:00 recipes/slurm.sh bash recipes/dpo_rpo.sh
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-allenai/Llama-3.1-Tulu-3-8B-SFT}
PAIRS=${PAIRS:-trl-lib/ultrafeedback_binarized}  # with score_chosen and score_rejected, 1 to 10
OUT=${OUT:-runs/pairs}
run=(torchrun --nproc_per_node="${NPROC:-8}")
sources=(--model "$MODEL" --dataset "$PAIRS" --track)
small=()
if [ "${SMOKE:-}" ]; then
  run=(python)
  sources=()
  small=(--batch_size 8 --max_steps 2 --num_samples 2 --micro_batch_tokens 2048)
fi
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600  # seconds that torchrun gives a stop to save
same=(--learning_rate 9e-7 --lr_schedule cosine --warmup_steps 10 --weight_decay 0.1 --max_grad_norm 1.0
  --batch_size 512 --beta 0.1 --sft_coef 0 --max_length 4096 --num_epochs 1 --micro_batch_tokens 16384)

"${run[@]}" dpo.py "${sources[@]}" "${same[@]}" --output_dir "$OUT/dpo" "${small[@]}"
"${run[@]}" dpo.py "${sources[@]}" "${same[@]}" --loss rpo_bwd_kl --reward_scale 1.0 --output_dir "$OUT/rpo" "${small[@]}"
