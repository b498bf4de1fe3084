#!/bin/sh
# PPO with critic warm-up: the actor is not updated on the first rollouts, so that the first advantages it sees come from a critic
# that has learnt something.
# Data: one-digit sums (examples/demo/prepare.py), scored by examples/rewards/math_reward.py.
# Needs: two cores and 12 GB of memory as it is; a GPU is used where there is one.
# Change: MODEL, DATA, REWARD and OUT in the environment (common.sh), any flag of togi rl after the script's name.
set -eu
. "$(dirname "$0")/common.sh"
train --advantage_estimator gae --n_samples_per_prompt 4 --init_kl_coef 0 --lambd 0.95 --critic_learning_rate 1e-5 \
  --freezing_actor_steps 2 --save_value_network "$@"
