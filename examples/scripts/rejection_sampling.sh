#!/bin/sh
# Rejection sampling: each round learns the best of several outputs to each prompt.
set -eu
. "$(dirname "$0")/common_best_of_n.sh"
iterate rs --temperature 0.9 --learning_rate 5e-6 "$@"
