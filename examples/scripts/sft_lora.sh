#!/bin/sh
# LoRA (Hu et al., 2021): a small adapter beside frozen weights, then merged into a plain model. --load_in_4bit makes it QLoRA.
# Data: 48 conversations about sums (examples/data/chat).
# Needs: two cores and 2 GB of memory as it is; a GPU is used where there is one.
# Change: MODEL, DATA and OUT in the environment (common_offline.sh), any flag of togi sft after the script's name.
set -eu
. "$(dirname "$0")/common_offline.sh"
train sft chat --input_key messages --apply_chat_template --lora_rank 16 --lora_alpha 32 --learning_rate 2e-4 "$@"
"${TOGI:-togi}" merge-lora --lora_path "$OUT/model" --output_path "$OUT/merged"
