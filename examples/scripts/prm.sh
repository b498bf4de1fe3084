#!/bin/sh
# A process reward model: after each step, at the placeholder, is the step right (+) or wrong (-)?
# Data: 48 calculations with a label after each step (examples/data/steps).
# Needs: two cores and 4 GB of memory as it is; a GPU is used where there is one.
# Change: MODEL, DATA and OUT in the environment (common_offline.sh), any flag of togi prm after the script's name.
set -eu
. "$(dirname "$0")/common_offline.sh"
train prm steps --input_key text --label_key labels --placeholder_token "#" --reward_tokens + - --learning_rate 1e-5 "$@"
