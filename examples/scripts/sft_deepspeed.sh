#!/bin/sh
# Supervised fine-tuning in several processes with DeepSpeed: ZeRO stage 3, optimizer in host memory. Leave --backend out for
# FSDP2, which gives the same losses; a checkpoint of one goes on in the other, with any number of processes.
# Data: 48 conversations about sums (examples/data/chat).
# Needs: PROCESSES (2), 4 GB of memory or one GPU for each; pip install '.[deepspeed]'.
# Change: PROCESSES too; MODEL, DATA and OUT in the environment (common_offline.sh), any flag of togi sft after the name.
set -eu
. "$(dirname "$0")/common_offline.sh"
PROCESSES="${PROCESSES:-2}"
TOGI=in_processes
train sft chat --input_key messages --apply_chat_template --multiturn --learning_rate 2e-5 \
  --backend deepspeed --zero_stage 3 --adam_offload "$@"
