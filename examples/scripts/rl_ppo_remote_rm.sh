#!/bin/sh
# PPO against a reward model that serve_rm.sh serves. A server that is down pauses the run until it is back; several URLs,
# separated by commas, share the work.
# Data: one-digit sums (examples/demo/prepare.py).
# Needs: a reward server; two cores and 10 GB of memory as it is; a GPU is used where there is one.
# Change: URL, MODEL, DATA and OUT in the environment (common.sh), any flag of togi rl after the script's name.
set -eu
. "$(dirname "$0")/common.sh"
rl --remote_rm_url "${URL:-http://127.0.0.1:5000/get_reward}" --remote_rm_max_pause 3600 --colocate_all_models \
  --advantage_estimator gae --n_samples_per_prompt 4 --init_kl_coef 0.01 --lambd 0.95 --critic_learning_rate 1e-5 "$@"
