#!/bin/sh
# Iterative DPO: each round prefers the best of several outputs to the worst; equally good ones make no pair.
# Data: 48 sums (examples/data/pairs), scored by examples/rewards/math_reward.py.
# Needs: two cores and 6 GB of memory as it is; a GPU is used where there is one.
# Change: MODEL, DATA, REWARD, ENGINE and OUT in the environment (common_best_of_n.sh), flags of togi iterate after
#   the name.
set -eu
. "$(dirname "$0")/common_best_of_n.sh"
iterate dpo --best_of_n 8 --learning_rate 2e-6 --beta 0.1 "$@"
