#!/bin/sh
# On-policy distillation (Agarwal et al., 2023): the student answers the prompts itself and learns what its teacher says there.
set -eu
. "$(dirname "$0")/common_offline.sh"
train kd pairs --input_key prompt --output_key chosen --apply_chat_template --teacher_model "${TEACHER:-$MODEL}" \
  --on_policy_share 1 --kd_divergence reverse --rollout_engine transformers --generate_max_len 64 --learning_rate 5e-6 "$@"
