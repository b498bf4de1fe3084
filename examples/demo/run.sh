#!/bin/sh
# Train the demo model: GRPO on one-digit sums. Arguments are passed on to togi rl, for example --seed 2.
set -eu
here="$(cd "$(dirname "$0")" && pwd)"
cache="${TOGI_CACHE:-$HOME/.cache/togi}"
run="runs/demo-$(date +%Y%m%d-%H%M%S)"
export HF_HUB_OFFLINE=1
exec "${TOGI:-togi}" rl --config "$here/demo.yaml" \
  --pretrain "$cache/smollm2-135m-instruct" \
  --prompt_data "$cache/demo-sums/train.jsonl" --eval_dataset "$cache/demo-sums/test.jsonl" \
  --reward_func "$here/../rewards/math_reward.py" \
  --run_dir "$run" --save_path "$run/model" --ckpt_path "$run/checkpoints" "$@"
