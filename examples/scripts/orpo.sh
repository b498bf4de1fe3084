#!/bin/sh
# ORPO (Hong et al., 2024): learns the chosen answers and prefers them to the rejected ones in one loss, without a reference.
# Data: 48 pairs of a right and a wrong sum (examples/data/pairs).
# Needs: two cores and 3 GB of memory as it is; a GPU is used where there is one.
# Change: MODEL, DATA and OUT in the environment (common_offline.sh), any flag of togi orpo after the script's name.
set -eu
. "$(dirname "$0")/common_offline.sh"
train orpo pairs --prompt_key prompt --apply_chat_template --odds_ratio_coef 0.1 --learning_rate 8e-6 "$@"
