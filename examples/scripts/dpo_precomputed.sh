#!/bin/sh
# DPO whose reference scores every row once, before training, and then leaves memory. --ref_offload in the place of
# --precompute_ref keeps it in host memory and scores each step, as --teacher_offload does in togi kd.
# Data: 48 pairs of a right and a wrong sum (examples/data/pairs).
# Needs: two cores and 4 GB of memory as it is; a GPU is used where there is one.
# Change: MODEL, DATA and OUT in the environment (common_offline.sh), any flag of togi dpo after the script's name.
set -eu
. "$(dirname "$0")/common_offline.sh"
train dpo pairs --prompt_key prompt --apply_chat_template --beta 0.1 --learning_rate 5e-6 --precompute_ref "$@"
