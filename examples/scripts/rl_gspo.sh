#!/bin/sh
# GSPO: one ratio a sequence, clipped in the narrow range of its paper (Zheng et al., 2025); two updates on each rollout.
# Data: one-digit sums (examples/demo/prepare.py), scored by examples/rewards/math_reward.py.
# Needs: two cores and 8 GB of memory as it is; a GPU is used where there is one.
# Change: MODEL, DATA, REWARD and OUT in the environment (common.sh), any flag of togi rl after the script's name.
set -eu
. "$(dirname "$0")/common.sh"
train --algo grpo --init_kl_coef 0 --n_samples_per_prompt 8 --policy_loss_type gspo --eps_clip_low_high 3e-4 4e-4 "$@"
