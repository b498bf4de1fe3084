#!/bin/sh
# Asynchronous GRPO: two rollouts are in work beyond the one that is trained, and responses in progress go on under new weights
# (docs/staleness.md). The same command with the same OUT goes on after a kill; finished responses are used again.
# Data: one-digit sums (examples/demo/prepare.py), scored by examples/rewards/math_reward.py.
# Needs: two cores and 12 GB of memory as it is; two GPUs where there are any: one generates while the other trains.
# Change: STALENESS, MODEL, DATA, REWARD and OUT in the environment (common.sh), any flag of togi rl after the script's name.
set -eu
. "$(dirname "$0")/common.sh"
rl --reward_func "$REWARD" --max_staleness "${STALENESS:-2}" --on_stale mask --advantage_estimator group_norm \
  --n_samples_per_prompt 8 --init_kl_coef 0 --save_steps 4 --load_checkpoint "$@"
