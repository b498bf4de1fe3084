#!/bin/sh
# DAPO (Yu et al., 2025): GRPO without a KL, with a higher upper clip, only groups that are neither all right nor all wrong,
# and a penalty that grows over the last tokens before the limit; engine and trainer are weighed against each other.
# Data: one-digit sums (examples/demo/prepare.py), scored by examples/rewards/math_reward.py.
# Needs: two cores and 8 GB of memory as it is; a GPU is used where there is one.
# Change: MODEL, DATA, REWARD and OUT in the environment (common.sh), any flag of togi rl after the script's name.
set -eu
. "$(dirname "$0")/common.sh"
train --advantage_estimator group_norm --n_samples_per_prompt 8 --init_kl_coef 0 --eps_clip_low_high 0.2 0.28 \
  --dynamic_filtering --dynamic_filtering_reward_range 0 1 --overlong_buffer_len 16 --overlong_penalty_factor 1 \
  --loss_aggregation token_mean --enable_vllm_is_correction "$@"
