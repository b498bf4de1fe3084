#!/bin/sh
# GRPO of a LoRA adapter: the frozen base is the reference, engines get merged weights. --load_in_4bit makes it QLoRA.
# Data: one-digit sums (examples/demo/prepare.py), scored by examples/rewards/math_reward.py.
# Needs: two cores and 8 GB of memory as it is; a GPU is used where there is one.
# Change: MODEL, DATA, REWARD and OUT in the environment (common.sh), any flag of togi rl after the script's name.
set -eu
. "$(dirname "$0")/common.sh"
train --advantage_estimator group_norm --n_samples_per_prompt 8 --use_kl_loss --kl_estimator k3 --init_kl_coef 1e-3 \
  --lora_rank 16 --lora_alpha 32 --actor_learning_rate 1e-4 "$@"
