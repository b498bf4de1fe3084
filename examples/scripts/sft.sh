#!/bin/sh
# Supervised fine-tuning on conversations; --multiturn learns every turn of the assistant.
set -eu
. "$(dirname "$0")/common_offline.sh"
train sft chat --input_key messages --apply_chat_template --multiturn --learning_rate 2e-5 "$@"
