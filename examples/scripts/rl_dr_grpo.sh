#!/bin/sh
# Dr. GRPO: GRPO without the division by the deviation and by the response length (Liu et al., 2025).
# Data: one-digit sums (examples/demo/prepare.py), scored by examples/rewards/math_reward.py.
# Needs: two cores and 8 GB of memory as it is; a GPU is used where there is one.
# Change: MODEL, DATA, REWARD and OUT in the environment (common.sh), any flag of togi rl after the script's name.
set -eu
. "$(dirname "$0")/common.sh"
train --advantage_estimator dr_grpo --n_samples_per_prompt 8 --init_kl_coef 0 "$@"
