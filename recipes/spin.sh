#!/usr/bin/env bash
# SPIN of zephyr-7b-sft-full on the prompts of the paper's first iteration, as NeMo-Aligner's guide found it best: one
# iteration of one epoch, beta 0.1, batch 64, a constant 4e-7. The paper's four iterations: ITERATIONS=4. Run again, it
# goes on where it was. NPROC: GPUs of a node. SMOKE=1: the toy world, a few prompts on a CPU.
#   sbatch --nodes=1 --gpus-per-node=8 --time=8:00:00 recipes/slurm.sh bash recipes/spin.sh
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-alignment-handbook/zephyr-7b-sft-full}
DATA=${DATA:-UCLA-AGI/SPIN_iter0}
OUT=${OUT:-runs/zephyr}
run=(torchrun --nproc_per_node="${NPROC:-8}")
sources=(--model "$MODEL" --dataset "$DATA" --track)
method=(--num_iterations 1 --num_epochs 1 --beta 0.1 --learning_rate 4e-7 --lr_schedule constant)
if [ "${ITERATIONS:-1}" = 4 ]; then
  method=(--num_iterations 4 --num_epochs 2 --beta 0.1 0.1 0.1 5.0 --learning_rate 5e-7 5e-7 1e-7 1e-7)
fi
small=()
if [ "${SMOKE:-}" ]; then
  run=(python)
  sources=()
  small=(--num_prompts 8 --batch_size 8 --max_new_tokens 8 --num_samples 2 --micro_batch_tokens 2048)
fi
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600  # seconds that torchrun gives a stop to save

"${run[@]}" spin.py "${sources[@]}" "${method[@]}" --weight_decay 0.1 --batch_size 64 --max_length 4096 \
  --max_new_tokens 2048 --micro_batch_tokens 16384 --output_dir "$OUT/spin" "${small[@]}"
