#!/bin/sh
# SimPO (Meng et al., 2024): preferences without a reference model, by the mean log-prob of each answer's tokens.
# Data: 48 pairs of a right and a wrong sum (examples/data/pairs).
# Needs: two cores and 3 GB of memory as it is; a GPU is used where there is one.
# Change: MODEL, DATA and OUT in the environment (common_offline.sh), any flag of togi simpo after the script's name.
set -eu
. "$(dirname "$0")/common_offline.sh"
train simpo pairs --prompt_key prompt --apply_chat_template --beta 2 --gamma 1 --learning_rate 2e-6 "$@"
