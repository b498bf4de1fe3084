# Sourced by the scripts beside it. What is trained on what, small enough for a laptop; the environment chooses otherwise:
#   MODEL=... DATA=... INPUT_KEY=... LABEL_KEY=... REWARD=... OUT=... examples/scripts/rl_grpo.sh --bf16 --num_episodes 3
# Without MODEL and DATA: the model and the sums of examples/demo/prepare.py. Flags after the script's name win.
here="$(cd "$(dirname "$0")" && pwd)"
cache="${TOGI_CACHE:-$HOME/.cache/togi}"
MODEL="${MODEL:-$cache/smollm2-135m-instruct}"
DATA="${DATA:-$cache/demo-sums/train.jsonl}"
REWARD="${REWARD:-$here/../rewards/math_reward.py}"
OUT="${OUT:-runs/$(basename "$0" .sh)-$(date +%Y%m%d-%H%M%S)}"

rl() {  # rl flags...: everything but the reward and the placement
  "${TOGI:-togi}" rl \
    --pretrain "$MODEL" --prompt_data "$DATA" --input_key "${INPUT_KEY:-prompt}" --label_key "${LABEL_KEY:-answer}" \
    --apply_chat_template --run_dir "$OUT" --save_path "$OUT/model" --ckpt_path "$OUT/checkpoints" \
    --bf16 \
    --rollout_batch_size 16 --train_batch_size 64 --prompt_max_len 256 --generate_max_len 64 --max_tokens_per_gpu 4096 "$@"
}

train() {  # train flags...: the reward function, and all models in one place
  rl --reward_func "$REWARD" --colocate_all_models "$@"
}

hybrid() {  # hybrid flags...: as train, and who does not work gives its memory back
  train --vllm_enable_sleep --deepspeed_enable_sleep "$@"
}
