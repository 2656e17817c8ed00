#!/usr/bin/env bash
# NeMo-Aligner's SteerLM guide on one node of 8 GPUs: attribute model, annotation, attribute-conditioned fine-tuning and a
# bootstrap, in one run that resumes when it is started again. RATINGS and CHATS may be the folders that the guide's preprocessing
# scripts write, data/oasst and data/helpsteer, as they are. SMOKE=1: a minute on a CPU, with a few steps of the toy world.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs}
MODEL=${MODEL:-meta-llama/Llama-3.1-8B}
RATINGS=${RATINGS:-nvidia/HelpSteer2}
CHATS=${CHATS:-nvidia/Daring-Anteater}
RUN=(torchrun --nproc_per_node="${NPROC:-8}" steerlm.py --model "$MODEL" --chat_template chatml --ratings "$RATINGS" --dataset "$CHATS"
  --num_bootstrap_rounds 1 --track)
ATTRIBUTES=helpfulness:4,correctness:4,coherence:4,complexity:2,verbosity:2
if [ -n "${SMOKE:-}" ]; then
  ATTRIBUTES=verbosity:1,toxicity:0
  RUN=(python steerlm.py --attributes "$ATTRIBUTES" --num_samples 2 --num_bootstrap_prompts 8
    --reward_model="--max_steps 2 --batch_size 16" --sft="--max_steps 2 --batch_size 16")
fi
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600  # seconds that torchrun gives a stop to save

"${RUN[@]}" --output_dir "$OUT/steerlm"
python -m common.chat --model "$OUT/steerlm" --attributes "$ATTRIBUTES" "What does a cow eat?"
