#!/bin/sh
# Ring attention: RING processes compute each batch together, each with its part of the tokens, for sequences too long for one.
set -eu
. "$(dirname "$0")/common_offline.sh"
RING="${RING:-2}"
in_ring() {
  command="$1"
  shift
  "${TORCHRUN:-torchrun}" --standalone --nproc_per_node "$RING" -m "togi.cli.train_$command" "$@"
}
TOGI=in_ring
train sft chat --input_key messages --apply_chat_template --multiturn --learning_rate 2e-5 --ring_attn_size "$RING" "$@"
