#!/usr/bin/env bash
# The reward models of NeMo-Aligner's SteerLM guide on one node of 8 GPUs: regression on HelpSteer2's helpfulness, then scaled
# Bradley-Terry on its preferences from that head (HelpSteer2-Preference). First:
#   hf download nvidia/HelpSteer2 --repo-type dataset --local-dir data/HelpSteer2
# Both steps resume when run again. SMOKE=1: half a minute on a CPU, on a few records with HelpSteer2's columns.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs}
MODEL=${MODEL:-meta-llama/Llama-3.1-70B-Instruct}
DATA=${DATA:-data/HelpSteer2}
RUN=(torchrun --nproc_per_node="${NPROC:-8}")
REGRESSION=(--learning_rate 2e-6 --num_epochs 2 --batch_size 128 --track)
SCALED_BT=(--learning_rate 1e-6 --batch_size 128 --track)
if [ -n "${SMOKE:-}" ]; then
  RUN=(python) MODEL=toy DATA=$OUT/HelpSteer2
  REGRESSION=(--learning_rate 1e-3 --batch_size 8 --max_steps 2) SCALED_BT=("${REGRESSION[@]}")
  mkdir -p "$DATA/preference"
  rm -f "$DATA"/*.jsonl "$DATA"/preference/*.jsonl
  for i in $(seq 16); do
    [ "$i" -le 12 ] && file=train split=train || file=validation split=validation
    echo "{\"prompt\": \"$i+1?\", \"response\": \"$((i + 1))\", \"helpfulness\": $((i % 5)), \"correctness\": 4, \"coherence\": 4, \"complexity\": 0, \"verbosity\": 0}" >> "$DATA/$file.jsonl"
    echo "{\"split\": \"$split\", \"prompt\": \"$i+1?\", \"response_1\": \"$i\", \"response_2\": \"$((i + 1))\", \"preference_strength\": $((1 + i % 3))}" >> "$DATA/preference/preference.jsonl"
  done
fi
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600  # seconds that torchrun gives a stop to save

PREFERENCES=$(ls "$DATA"/preference/preference.jsonl*)
"${RUN[@]}" reward_model.py --model "$MODEL" --loss regression --dataset "$DATA" --max_length 4096 \
  --lr_schedule constant --warmup_steps 10 --output_dir "$OUT/helpsteer2" "${REGRESSION[@]}"
"${RUN[@]}" reward_model.py --model "$OUT/helpsteer2" --loss scaled_bt --attribute helpfulness --dataset "$PREFERENCES" \
  --max_length 4096 --lr_schedule constant --warmup_steps 10 --output_dir "$OUT/helpsteer2_preference" "${SCALED_BT[@]}"
