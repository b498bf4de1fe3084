#!/bin/sh
# GRPO in an environment: the policy calls a tool until it has found a number, and learns from all its turns
# (docs/environments.md).
# Data: numbers to find, made by the environment's own file; ranges of the held-out part are not in the training part.
# Needs: two cores and 10 GB of memory as it is.
# Change: STALENESS, MODEL and OUT in the environment (common.sh), any flag of togi rl after the script's name.
set -eu
. "$(dirname "$0")/common.sh"
mkdir -p "$OUT"
for part in train test; do "${PYTHON:-python}" "$here/../environments/guess.py" --part $part >"$OUT/$part.jsonl"; done
"${TOGI:-togi}" rl --environment "$here/../environments/guess.py:Guess" \
  --pretrain "$MODEL" --prompt_data "$OUT/train.jsonl" --eval_dataset "$OUT/test.jsonl" --apply_chat_template \
  --run_dir "$OUT" --save_path "$OUT/model" --ckpt_path "$OUT/checkpoints" --bf16 \
  --max_staleness "${STALENESS:-0}" --advantage_estimator group_norm --init_kl_coef 0 --n_samples_per_prompt 8 \
  --rollout_batch_size 8 --train_batch_size 64 --max_steps 16 --actor_learning_rate 3e-5 --lr_scheduler constant \
  --max_turns 5 --prompt_max_len 640 --generate_max_len 40 --max_len 1024 --max_tokens_per_gpu 4096 \
  --eval_at_start --eval_steps 16 --eval_temperature 1 --eval_n_samples_per_prompt 2 "$@"
