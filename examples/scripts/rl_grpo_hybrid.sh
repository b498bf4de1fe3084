#!/bin/sh
# GRPO as a hybrid engine: engine, actor and reference share each GPU, and sleep in the phases that do not need them.
# Data: one-digit sums (examples/demo/prepare.py), scored by examples/rewards/math_reward.py.
# Needs: two cores and 8 GB of memory as it is; GPUs are used where there are some, all of them.
# Change: MODEL, DATA, REWARD and OUT in the environment (common.sh), any flag of togi rl after the script's name;
#   --vllm_tensor_parallel_size where one GPU does not hold the model.
set -eu
. "$(dirname "$0")/common.sh"
hybrid --advantage_estimator group_norm --n_samples_per_prompt 8 --use_kl_loss --kl_estimator k3 --init_kl_coef 1e-3 "$@"
