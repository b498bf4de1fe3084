#!/bin/sh
# ProRL v2 (Hu et al., 2025): REINFORCE++-baseline for long training: a higher upper clip, filtered groups, a small k2 KL loss,
# no reward for responses that the limit cut off, and no loss on tokens on which engine and trainer disagree (icepop).
# Data: one-digit sums (examples/demo/prepare.py), scored by examples/rewards/math_reward.py.
# Needs: two cores and 8 GB of memory as it is; a GPU is used where there is one.
# Change: MODEL, DATA, REWARD and OUT in the environment (common.sh), any flag of togi rl after the script's name.
set -eu
. "$(dirname "$0")/common.sh"
train --advantage_estimator reinforce_baseline --n_samples_per_prompt 8 --use_kl_loss --kl_estimator k2 --init_kl_coef 1e-4 \
  --eps_clip_low_high 0.2 0.27 --dynamic_filtering --dynamic_filtering_reward_range 0 1 --stop_properly_penalty_coef 0 \
  --enable_vllm_is_correction --vllm_is_correction_type icepop "$@"
