#!/bin/sh
# GRPO in several worker processes: WORKERS actors that train together, each beside an engine, with checkpoints that survive a
# SIGKILL: the same command with the same OUT goes on. The tests hold two workers to the results of one.
# Data: one-digit sums (examples/demo/prepare.py), scored by examples/rewards/math_reward.py.
# Needs: WORKERS GPUs (2), or as many cores and 6 GB of memory for each.
# Change: WORKERS, MODEL, DATA, REWARD and OUT in the environment (common.sh), any flag of togi rl after the script's name.
set -eu
. "$(dirname "$0")/common.sh"
WORKERS="${WORKERS:-2}"
train --actor_num_gpus_per_node "$WORKERS" --vllm_num_engines "$WORKERS" --zero_stage 3 --save_steps 2 --load_checkpoint \
  --advantage_estimator group_norm --n_samples_per_prompt 8 --init_kl_coef 0 "$@"
