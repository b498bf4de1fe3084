#!/bin/sh
# Ring attention: RING processes compute each batch together, each with its part of the tokens, for sequences too long for one.
# Data: 48 conversations about sums (examples/data/chat).
# Needs: RING processes (2), 4 GB of memory or one GPU for each.
# Change: RING too; MODEL, DATA and OUT in the environment (common_offline.sh), any flag of togi sft after the
#   script's name.
set -eu
. "$(dirname "$0")/common_offline.sh"
RING="${RING:-2}"
PROCESSES="$RING"
TOGI=in_processes
train sft chat --input_key messages --apply_chat_template --multiturn --learning_rate 2e-5 --ring_attn_size "$RING" "$@"
