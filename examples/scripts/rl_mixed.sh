#!/bin/sh
# GRPO with supervised rows mixed into every update (PPO-ptx), an entropy bonus, and a moving average of the weights, which is
# saved beside the model as OUT/model_ema.
# Data: one-digit sums (examples/demo/prepare.py), scored by examples/rewards/math_reward.py; plain text (examples/data/text).
# Needs: two cores and 8 GB of memory as it is; a GPU is used where there is one.
# Change: TEXTS too, rows with a field "text"; MODEL, DATA, REWARD and OUT in the environment (common.sh), any flag of togi rl
#   after the script's name.
set -eu
. "$(dirname "$0")/common.sh"
TEXTS="${TEXTS:-$here/../data/text/train.jsonl}"
train --advantage_estimator group_norm --n_samples_per_prompt 8 --init_kl_coef 0 --entropy_loss_coef 0.001 --enable_ema \
  --pretrain_data "$TEXTS" --pretrain_input_key text --ptx_coef 0.1 "$@"
