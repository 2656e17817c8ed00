#!/usr/bin/env bash
# DRaFT+ of SD 1.5, SDXL, SD 3.5 or FLUX.1 with PickScore on one node of 8 GPUs; resumes when run again.
#   recipes/draftp_8gpu.sh sd35          SMOKE=1 recipes/draftp_8gpu.sh sd35: a tiny random model, 2 steps, on CPU
set -euo pipefail
cd "$(dirname "$0")/.."
KIND=${1:-sd15}
PROMPTS=${PROMPTS:-prompts.txt}
REWARD=${REWARD:-yuvalkirstain/PickScore_v1}
OUT=${OUT:-runs/draftp_$KIND}
NPROC=${NPROC:-8}
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600  # seconds that torchrun gives a stop to save
case $KIND in  # model, steps and guidance it was made for, images in one forward
  sd15) MODEL=stable-diffusion-v1-5/stable-diffusion-v1-5 TINY=sd; SAMPLER=(--num_inference_steps 50 --guidance_scale 7.5 --micro_batch_size 4) ;;
  sdxl) MODEL=stabilityai/stable-diffusion-xl-base-1.0 TINY=xl; SAMPLER=(--num_inference_steps 40 --guidance_scale 5 --micro_batch_size 1) ;;
  sd35) MODEL=stabilityai/stable-diffusion-3.5-medium TINY=sd3; SAMPLER=(--num_inference_steps 28 --guidance_scale 4.5 --micro_batch_size 1) ;;
  flux) MODEL=black-forest-labs/FLUX.1-dev TINY=flux; SAMPLER=(--num_inference_steps 28 --guidance_scale 3.5 --micro_batch_size 1 --image_size 1024) ;;
  *) echo "draftp_8gpu.sh: found $KIND; expected sd15, sdxl, sd35 or flux" >&2; exit 2 ;;
esac
EXTRA=()
if [ -n "${SMOKE:-}" ]; then
  WORK=$(mktemp -d) && trap 'rm -rf "$WORK"' EXIT
  MODEL=$WORK/model PROMPTS=$WORK/prompts.txt REWARD=brightness OUT=$WORK/run NPROC=1
  PYTHONPATH=tests python -c "import sys, tiny_diffusion; tiny_diffusion.make_pipeline(sys.argv[1], sys.argv[2])" "$MODEL" "$TINY"
  printf '%s\n' "a cat" "a dog" "two cats" "a red house" {1..40}" birds" > "$PROMPTS"
  EXTRA=(--num_inference_steps 3 --image_size 16 --batch_size 2 --lora_rank 2 --lora_alpha 2 --max_steps 2 --num_samples 2 --images_per_prompt 2)
fi
torchrun --nproc_per_node="$NPROC" draftp.py --model "$MODEL" --dataset "$PROMPTS" --reward "$REWARD" \
  "${SAMPLER[@]}" --max_steps 1000 --output_dir "$OUT" ${EXTRA[@]+"${EXTRA[@]}"}
