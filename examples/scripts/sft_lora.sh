#!/bin/sh
# LoRA (Hu et al., 2021): a small adapter beside frozen weights, then merged into a plain model. --load_in_4bit makes it QLoRA.
set -eu
. "$(dirname "$0")/common_offline.sh"
train sft chat --input_key messages --apply_chat_template --lora_rank 16 --lora_alpha 32 --learning_rate 2e-4 "$@"
"${TOGI:-togi}" merge-lora --lora_path "$OUT/model" --output_path "$OUT/merged"
