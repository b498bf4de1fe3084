#!/bin/sh
# A reward model from preference pairs (Bradley-Terry); loads with AutoModelForSequenceClassification.
# Data: 48 pairs of a right and a wrong sum (examples/data/pairs).
# Needs: two cores and 4 GB of memory as it is; a GPU is used where there is one.
# Change: MODEL, DATA and OUT in the environment (common_offline.sh), any flag of togi rm after the script's name.
set -eu
. "$(dirname "$0")/common_offline.sh"
train rm pairs --prompt_key prompt --apply_chat_template --learning_rate 1e-5 "$@"
