#!/bin/sh
# Tensor parallelism: PARTS processes each hold a part of every layer's weights and heads; with more PROCESSES, a multiple of
# PARTS, the data are dealt to so many groups.
# Data: 48 conversations about sums (examples/data/chat).
# Needs: PROCESSES processes (PARTS, 3), 4 GB of memory or one GPU for each. The model's heads must divide by PARTS.
# Change: PARTS and PROCESSES too; MODEL, DATA and OUT in the environment (common_offline.sh), any flag of togi sft after the
#   script's name.
set -eu
. "$(dirname "$0")/common_offline.sh"
PARTS="${PARTS:-3}"
PROCESSES="${PROCESSES:-$PARTS}"
TOGI=in_processes
train sft chat --input_key messages --apply_chat_template --multiturn --learning_rate 2e-5 --ds_tensor_parallel_size "$PARTS" "$@"
