#!/bin/sh
# Train again on the rollouts that a run has stored, without an engine and without a reward: to see what a loss, a backend or a
# number of workers changes. The prompts and their numbers must be those of that run.
# Data: the folder RUN of a run of rl_grpo.sh, and its prompts.
# Needs: two cores and 6 GB of memory as it is; a GPU is used where there is one.
# Change: RUN, MODEL, DATA and OUT in the environment (common.sh), any flag of togi rl after the script's name.
set -eu
. "$(dirname "$0")/common.sh"
rl --replay "${RUN:?set RUN to the folder of a run}" --colocate_all_models --advantage_estimator group_norm \
  --n_samples_per_prompt 8 --init_kl_coef 0 "$@"
