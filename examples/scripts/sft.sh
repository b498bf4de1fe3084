#!/bin/sh
# Supervised fine-tuning on conversations; --multiturn learns every turn of the assistant.
# Data: 48 conversations about sums (examples/data/chat).
# Needs: two cores and 4 GB of memory as it is; a GPU is used where there is one.
# Change: MODEL, DATA and OUT in the environment (common_offline.sh), any flag of togi sft after the script's name.
set -eu
. "$(dirname "$0")/common_offline.sh"
train sft chat --input_key messages --apply_chat_template --multiturn --learning_rate 2e-5 "$@"
