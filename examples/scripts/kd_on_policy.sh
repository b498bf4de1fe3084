#!/bin/sh
# On-policy distillation (Agarwal et al., 2023): the student answers the prompts itself and learns what its teacher says there.
# Data: 48 sums (examples/data/pairs); the answers are the student's own.
# Needs: two cores and 4 GB of memory as it is; a GPU is used where there is one.
# Change: TEACHER too; MODEL, DATA and OUT in the environment (common_offline.sh), any flag of togi kd after the
#   script's name.
set -eu
. "$(dirname "$0")/common_offline.sh"
train kd pairs --input_key prompt --output_key chosen --apply_chat_template --teacher_model "${TEACHER:-$MODEL}" \
  --on_policy_share 1 --kd_divergence reverse --rollout_engine transformers --generate_max_len 64 --learning_rate 5e-6 "$@"
