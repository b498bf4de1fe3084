#!/bin/sh
# PPO of long sequences with ring attention: RING workers of a model compute each batch together, each with its part of the
# tokens, so that --max_tokens_per_gpu x RING is what a sequence may have.
# Data: one-digit sums (examples/demo/prepare.py), scored by examples/rewards/math_reward.py.
# Needs: RING (2) GPUs for actor and reference, RING for the critic, one for the engine; or as many processes, 20 GB in all.
# Change: RING, MODEL, DATA, REWARD and OUT in the environment (common.sh), any flag of togi rl after the script's name.
set -eu
. "$(dirname "$0")/common.sh"
RING="${RING:-2}"
rl --reward_func "$REWARD" --ring_attn_size "$RING" --actor_num_gpus_per_node "$RING" --vllm_num_engines 1 \
  --colocate_actor_ref --advantage_estimator gae --n_samples_per_prompt 4 --init_kl_coef 0.01 --lambd 0.95 \
  --critic_learning_rate 1e-5 "$@"
