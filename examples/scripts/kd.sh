#!/bin/sh
# Distillation: learn the teacher's whole distribution at every token. TEACHER is the model itself until it names a larger one
# of the same family.
# Data: 48 sums and their results (examples/data/pairs).
# Needs: two cores and 4 GB of memory as it is; a GPU is used where there is one.
# Change: TEACHER too; MODEL, DATA and OUT in the environment (common_offline.sh), any flag of togi kd after the
#   script's name.
set -eu
. "$(dirname "$0")/common_offline.sh"
train kd pairs --input_key prompt --output_key chosen --apply_chat_template --teacher_model "${TEACHER:-$MODEL}" \
  --kd_coef 0.5 --learning_rate 1e-5 "$@"
