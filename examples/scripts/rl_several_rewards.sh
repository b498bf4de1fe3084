#!/bin/sh
# GRPO with several rewards: two local reward models and a function, weighted. Every part is logged and stored; a sample whose
# reward fails is left out, and more than 5 % of them stop the run.
# Data: one-digit sums (examples/demo/prepare.py), scored by RM and by examples/rewards/math_reward.py.
# Needs: RM, two reward models separated by a comma, with MODEL's tokenizer; two cores and 10 GB of memory as it is.
# Change: RM, REWARD, MODEL, DATA and OUT in the environment (common.sh), any flag of togi rl after the script's name.
set -eu
. "$(dirname "$0")/common.sh"
RM="${RM:?set RM to two folders of reward models, separated by a comma}"
train --reward_pretrain "$RM" --reward_weights 1 0.5 0.2 --on_reward_error drop_sample --max_reward_errors 0.05 \
  --advantage_estimator group_norm --n_samples_per_prompt 8 --init_kl_coef 0 "$@"
