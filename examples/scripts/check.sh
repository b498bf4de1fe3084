#!/bin/sh
# Before a run: everything that GRPO would do up to its first step, and whether it would learn, in seconds. Nothing is trained.
# Data: one-digit sums (examples/demo/prepare.py), scored by examples/rewards/math_reward.py.
# Needs: two cores and 4 GB of memory as it is; a GPU is used where there is one.
# Change: MODEL, DATA and REWARD in the environment, any flag of togi rl after the script's name.
set -eu
here="$(cd "$(dirname "$0")" && pwd)"
cache="${TOGI_CACHE:-$HOME/.cache/togi}"
"${TOGI:-togi}" check rl \
  --pretrain "${MODEL:-$cache/smollm2-135m-instruct}" --prompt_data "${DATA:-$cache/demo-sums/train.jsonl}" \
  --input_key "${INPUT_KEY:-prompt}" --label_key "${LABEL_KEY:-answer}" --apply_chat_template \
  --reward_func "${REWARD:-$here/../rewards/math_reward.py}" --advantage_estimator group_norm --n_samples_per_prompt 8 \
  --rollout_batch_size 16 --train_batch_size 64 --prompt_max_len 256 --generate_max_len 64 --bf16 \
  --rollout_engine transformers --sample_groups 8 "$@"
