#!/bin/sh
# Asynchronous GRPO of a LoRA adapter: only the adapter is sent to the engines, in the middle of responses; the frozen base is
# the reference (docs/staleness.md).
# Data: one-digit sums (examples/demo/prepare.py), scored by examples/rewards/math_reward.py.
# Needs: two cores and 12 GB of memory as it is; two GPUs where there are any: one generates while the other trains.
# Change: STALENESS, MODEL, DATA, REWARD and OUT in the environment (common.sh), any flag of togi rl after the script's name.
set -eu
. "$(dirname "$0")/common.sh"
rl --reward_func "$REWARD" --max_staleness "${STALENESS:-2}" --on_stale mask --advantage_estimator group_norm \
  --n_samples_per_prompt 8 --use_kl_loss --kl_estimator k3 --init_kl_coef 1e-3 --lora_rank 16 --lora_alpha 32 \
  --actor_learning_rate 1e-4 "$@"
