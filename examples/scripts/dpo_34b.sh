#!/bin/sh
# DPO of a model of 34 billion weights on one node: everything sharded, Adam and the reference in host memory.
# Data: 48 pairs of a right and a wrong sum (examples/data/pairs); DATA must name a real set.
# Needs: 8 GPUs of 80 GB and 600 GB of host memory: 12 bytes a weight on the host, 6 on the GPUs, 26 GB each.
#   Computed, not measured; the tests run the same flags with a tiny model in two processes.
# Change: MODEL, DATA, OUT and PROCESSES in the environment (common_offline.sh), any flag of togi dpo after the name.
set -eu
MODEL="${MODEL:-01-ai/Yi-1.5-34B-Chat}"
. "$(dirname "$0")/common_offline.sh"
PROCESSES="${PROCESSES:-8}"
TOGI=in_processes
train dpo pairs --prompt_key prompt --apply_chat_template --max_len 2048 --max_tokens_per_gpu 8192 --train_batch_size 128 \
  --max_epochs 1 --learning_rate 5e-7 --beta 0.1 --zero_stage 3 --adam_offload --ref_offload --gradient_checkpointing \
  --flash_attn "$@"
