#!/bin/sh
# LoRA of a mixture of experts: adapters on the attention, the router kept in balance by its own loss, weights sharded.
# Data: 48 conversations about sums (examples/data/chat); DATA must name a real set.
# Needs: 8 GPUs of 80 GB: 47 billion frozen weights in bfloat16 are 94 GB, 12 GB a GPU, and activations of 16,384 tokens.
#   Computed, not measured; the tests run the same flags with a tiny mixture in two processes.
# Change: MODEL, DATA, OUT and PROCESSES in the environment (common_offline.sh), any flag of togi sft after the name.
set -eu
MODEL="${MODEL:-mistralai/Mixtral-8x7B-v0.1}"
. "$(dirname "$0")/common_offline.sh"
PROCESSES="${PROCESSES:-8}"
TOGI=in_processes
train sft chat --input_key messages --apply_chat_template --multiturn --max_len 2048 --max_tokens_per_gpu 16384 \
  --train_batch_size 128 --max_epochs 1 --learning_rate 1e-4 --zero_stage 3 --gradient_checkpointing --flash_attn \
  --lora_rank 64 --lora_alpha 64 --target_modules q_proj k_proj v_proj o_proj --aux_loss_coef 0.01 "$@"
