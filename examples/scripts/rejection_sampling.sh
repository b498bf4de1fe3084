#!/bin/sh
# Rejection sampling: each round learns the best of several outputs to each prompt.
# Data: 48 sums (examples/data/pairs), scored by examples/rewards/math_reward.py.
# Needs: two cores and 6 GB of memory as it is; a GPU is used where there is one.
# Change: MODEL, DATA, REWARD, ENGINE and OUT in the environment (common_best_of_n.sh), flags of togi iterate after
#   the name.
set -eu
. "$(dirname "$0")/common_best_of_n.sh"
iterate rs --temperature 0.9 --learning_rate 5e-6 "$@"
