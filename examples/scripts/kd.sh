#!/bin/sh
# Distillation: learn the teacher's whole distribution at every token. TEACHER is the model itself until it names a larger one
# of the same family.
set -eu
. "$(dirname "$0")/common_offline.sh"
train kd pairs --input_key prompt --output_key chosen --apply_chat_template --teacher_model "${TEACHER:-$MODEL}" \
  --kd_coef 0.5 --learning_rate 1e-5 "$@"
