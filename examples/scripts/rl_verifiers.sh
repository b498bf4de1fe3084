#!/bin/sh
# GRPO with built-in verifiers: is the answer mathematically equal to the label, and is it nothing but a number? Generation
# with Transformers, which needs no vLLM.
# Data: one-digit sums (examples/demo/prepare.py).
# Needs: two cores and 6 GB of memory as it is; a GPU is used where there is one; pip install '.[rewards]'.
# Change: MODEL, DATA and OUT in the environment (common.sh), any flag of togi rl after the script's name.
set -eu
. "$(dirname "$0")/common.sh"
REWARD=builtin:math,builtin:format
train --format_regex '[0-9]+\.?' --reward_weights 1 0.2 --rollout_engine transformers --no_enforce_eager \
  --advantage_estimator group_norm --n_samples_per_prompt 8 --init_kl_coef 0 "$@"
