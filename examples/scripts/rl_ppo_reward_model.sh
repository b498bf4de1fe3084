#!/bin/sh
# PPO against a local reward model, with which the critic starts too: RM must be of MODEL's family, with its tokenizer.
# Data: one-digit sums (examples/demo/prepare.py).
# Needs: RM, such as rm.sh writes; two cores and 12 GB of memory as it is; a GPU is used where there is one.
# Change: MODEL, RM, DATA and OUT in the environment (common.sh), any flag of togi rl after the script's name.
set -eu
. "$(dirname "$0")/common.sh"
RM="${RM:?set RM to the folder of a reward model, such as examples/scripts/rm.sh writes}"
rl --reward_pretrain "$RM" --normalize_reward --colocate_actor_ref --colocate_critic_reward --advantage_estimator gae \
  --n_samples_per_prompt 4 --init_kl_coef 0.01 --lambd 0.95 --critic_learning_rate 1e-5 "$@"
