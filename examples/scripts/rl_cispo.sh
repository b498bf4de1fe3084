#!/bin/sh
# CISPO: the weight of a token's gradient is clipped from above and no gradient is dropped (MiniMax-M1, 2025); tokens that engine
# and trainer see too differently are left out.
# Data: one-digit sums (examples/demo/prepare.py), scored by examples/rewards/math_reward.py.
# Needs: two cores and 8 GB of memory as it is; a GPU is used where there is one.
# Change: MODEL, DATA, REWARD and OUT in the environment (common.sh), any flag of togi rl after the script's name.
set -eu
. "$(dirname "$0")/common.sh"
train --advantage_estimator group_norm --init_kl_coef 0 --n_samples_per_prompt 8 --policy_loss_type cispo \
  --eps_clip_low_high 1 0.28 --enable_vllm_is_correction --vllm_is_correction_type icepop "$@"
