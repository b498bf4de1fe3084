#!/bin/sh
# KTO: single answers labelled desirable or not (Ethayarajh et al., 2024).
# Data: 48 sums labelled right or wrong (examples/data/labelled).
# Needs: two cores and 4 GB of memory as it is; a GPU is used where there is one.
# Change: MODEL, DATA and OUT in the environment (common_offline.sh), any flag of togi kto after the script's name.
set -eu
. "$(dirname "$0")/common_offline.sh"
train kto labelled --input_key prompt --output_key response --apply_chat_template --beta 0.1 --learning_rate 5e-6 "$@"
