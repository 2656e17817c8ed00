#!/usr/bin/env bash
# SteerLM 2.0 on one node of 8 GPUs, from the run of steerlm.sh: an SFT policy P(y|x) on the same conversations, then two iterations
# of sampling, scoring and training. The last step trains on the groups of the first iteration alone, as NeMo-Aligner's guide does
# with a file of its own. All steps resume when run again. SMOKE=1: a minute on a CPU, with a few steps of the toy world.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs}
MODEL=${MODEL:-meta-llama/Llama-3.1-8B}
STEERLM=${STEERLM:-$OUT/steerlm}
ATTRIBUTE_MODEL=${ATTRIBUTE_MODEL:-$OUT/steerlm/1_attribute_model}
CHATS=${CHATS:-nvidia/Daring-Anteater}
RUN=(torchrun --nproc_per_node="${NPROC:-8}")
SFT=(--chat_template chatml --learning_rate 5e-6 --num_epochs 2 --max_length 4096 --track)
STEERLM2=(--num_prompts 20000 --num_responses 10 --batch_size 128 --max_new_tokens 1024 --track)
GROUPS_ONLY=(--batch_size 128 --track)
if [ -n "${SMOKE:-}" ]; then
  RUN=(python) MODEL=toy STEERLM=toy ATTRIBUTE_MODEL=toy/attribute_model CHATS=toy
  SFT=(--max_steps 2 --num_samples 0)
  STEERLM2=(--attributes toxicity:0,verbosity:1 --num_prompts 16 --num_responses 4 --batch_size 8 --num_samples 4)
  GROUPS_ONLY=(--batch_size 8 --num_samples 4)
fi
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600  # seconds that torchrun gives a stop to save

"${RUN[@]}" sft.py --model "$MODEL" --dataset "$CHATS" --output_dir "$OUT/sft" "${SFT[@]}"
"${RUN[@]}" steerlm2.py --model "$STEERLM" --sft_model "$OUT/sft" --attribute_model "$ATTRIBUTE_MODEL" \
  --dataset "$CHATS" --output_dir "$OUT/steerlm2" "${STEERLM2[@]}"
"${RUN[@]}" steerlm2.py --model "$STEERLM" --groups "$OUT/steerlm2/groups_1.jsonl" --attribute_model "$ATTRIBUTE_MODEL" \
  --output_dir "$OUT/steerlm2_groups" "${GROUPS_ONLY[@]}"
