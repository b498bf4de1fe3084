#!/bin/sh
# PPO: a critic, generalised advantage estimation, the KL to the start model in the reward (Schulman et al., 2017).
# Data: one-digit sums (examples/demo/prepare.py), scored by examples/rewards/math_reward.py.
# Needs: two cores and 10 GB of memory as it is; a GPU is used where there is one.
# Change: MODEL, DATA, REWARD and OUT in the environment (common.sh), any flag of togi rl after the script's name.
set -eu
. "$(dirname "$0")/common.sh"
train --advantage_estimator gae --n_samples_per_prompt 4 --init_kl_coef 0.01 --lambd 0.95 \
  --critic_learning_rate 1e-5 --save_value_network "$@"
