#!/bin/sh
# An advantage estimator and a policy loss of your own, each a function in a file: a group's median as its baseline, and SPO.
# Data: one-digit sums (examples/demo/prepare.py), scored by examples/rewards/math_reward.py.
# Needs: two cores and 8 GB of memory as it is; a GPU is used where there is one.
# Change: the two files in examples/hooks; MODEL, DATA, REWARD and OUT in the environment (common.sh), any flag of togi rl after
# the script's name.
set -eu
. "$(dirname "$0")/common.sh"
train --advantage_estimator "$here/../hooks/median.py:median_baseline" --policy_loss_type "$here/../hooks/spo.py:spo" \
  --n_samples_per_prompt 8 --init_kl_coef 0 --max_epochs 2 "$@"
