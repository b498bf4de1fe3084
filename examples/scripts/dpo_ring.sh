#!/bin/sh
# DPO of long answers with ring attention: RING processes compute each batch together, each with its part of the tokens.
# Data: 48 pairs of a right and a wrong sum (examples/data/pairs).
# Needs: RING processes (2), 4 GB of memory or one GPU for each.
# Change: RING too; MODEL, DATA and OUT in the environment (common_offline.sh), any flag of togi dpo after the name.
set -eu
. "$(dirname "$0")/common_offline.sh"
RING="${RING:-2}"
PROCESSES="$RING"
TOGI=in_processes
train dpo pairs --prompt_key prompt --apply_chat_template --beta 0.1 --learning_rate 5e-6 --ring_attn_size "$RING" "$@"
