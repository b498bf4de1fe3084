#!/bin/sh
# A process reward model: after each step, at the placeholder, is the step right (+) or wrong (-)?
set -eu
. "$(dirname "$0")/common_offline.sh"
train prm steps --input_key text --label_key labels --placeholder_token "#" --reward_tokens + - --learning_rate 1e-5 "$@"
