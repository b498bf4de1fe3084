#!/bin/sh
# GRPO of an agent as it is: examples/agents/openai_agent.py asks the policy through the official openai client, which is given a
# base URL (docs/environments.md). The policy learns from every answer that it gave.
# Data: one-digit sums (examples/demo/prepare.py), for which the agent has a tool.
# Needs: two cores and 10 GB of memory as it is; pip install '.[environments]'.
# Change: AGENT, MODEL, DATA and OUT in the environment (common.sh), any flag of togi rl after the script's name.
set -eu
. "$(dirname "$0")/common.sh"
"${TOGI:-togi}" rl --agent "${AGENT:-$here/../agents/openai_agent.py:run}" \
  --pretrain "$MODEL" --prompt_data "$DATA" --apply_chat_template \
  --run_dir "$OUT" --save_path "$OUT/model" --ckpt_path "$OUT/checkpoints" --bf16 \
  --advantage_estimator group_norm --init_kl_coef 0 --n_samples_per_prompt 8 --rollout_batch_size 8 --train_batch_size 64 \
  --max_turns 6 --prompt_max_len 640 --generate_max_len 96 --max_len 1536 --max_tokens_per_gpu 4096 "$@"
