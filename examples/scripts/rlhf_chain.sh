#!/bin/sh
# The whole of RLHF: SFT; a reward model from pairs; PPO against that model behind `togi serve-rm`; and from the same SFT model
# iterative DPO and rejection sampling. At the end the reward model's mean score of each model's outputs for held-out prompts,
# as a table and in $OUT/rewards.json. A stopped script goes on when OUT names the same folder; a step of it that was stopped
# starts again.
# Data: the tiny sums of examples/data. Rows for SFT have "messages", pairs have "prompt" (a text or messages), "chosen" and
#   "rejected".
# Needs: two cores and 12 GB of memory; 45 minutes with the sizes below and about 500 pairs. A GPU is used where there is one.
# Change: MODEL, SFT_TRAIN, SFT_TEST, PAIRS_TRAIN, PAIRS_TEST, OUT and the sizes below in the environment.
set -eu
here="$(cd "$(dirname "$0")" && pwd)"
cache="${TOGI_CACHE:-$HOME/.cache/togi}"
MODEL="${MODEL:-$cache/smollm2-135m-instruct}"
SFT_TRAIN="${SFT_TRAIN:-$here/../data/chat/train.jsonl}"
SFT_TEST="${SFT_TEST:-$here/../data/chat/test.jsonl}"
PAIRS_TRAIN="${PAIRS_TRAIN:-$here/../data/pairs/train.jsonl}"
PAIRS_TEST="${PAIRS_TEST:-$here/../data/pairs/test.jsonl}"
OUT="${OUT:-runs/$(basename "$0" .sh)-$(date +%Y%m%d-%H%M%S)}"
ENGINE="${ENGINE:-vllm}"                     # or transformers
PRECISION="${PRECISION:---bf16}"             # or --no_bf16
SFT_SAMPLES="${SFT_SAMPLES:-100}" SFT_EPOCHS="${SFT_EPOCHS:-2}" PAIRS="${PAIRS:-400}"
MAX_LEN="${MAX_LEN:-512}"                    # of a row in training; longer ones are left out and counted
PROMPT_MAX_LEN="${PROMPT_MAX_LEN:-256}" NEW_TOKENS="${NEW_TOKENS:-128}"
PPO_STEPS="${PPO_STEPS:-10}" PPO_PROMPTS="${PPO_PROMPTS:-16}" PPO_SAMPLES="${PPO_SAMPLES:-4}"
ROUNDS="${ROUNDS:-2}" ROUND_PROMPTS="${ROUND_PROMPTS:-24}" BEST_OF_N="${BEST_OF_N:-6}"
CUT="${CUT:---no_keep_truncated}"             # outputs that NEW_TOKENS cut: --keep_truncated learns them too
EVAL_MODELS="${EVAL_MODELS:-start sft ppo dpo rs}" EVAL_SAMPLES="${EVAL_SAMPLES:-6}"
TOGI="${TOGI:-togi}" PYTHON="${PYTHON:-python3}"
mkdir -p "$OUT"

once() {  # once NAME COMMAND...: unless it was done already
  name="$1"
  shift
  [ -e "$OUT/$name.done" ] && return
  started="$(date +%s)"
  echo "== $name"
  "$@"
  echo "== $name: $(($(date +%s) - started)) s"
  : >"$OUT/$name.done"
}

train() {  # train COMMAND FOLDER flags...: a step of its own, from its beginning
  command="$1" folder="$OUT/$2"
  shift 2
  [ ! -d "$folder" ] || set -- "$@" --load_checkpoint  # the folder of a stopped step is taken over
  "$TOGI" "$command" --run_dir "$folder" --save_path "$folder/model" --ckpt_path "$folder/checkpoints" --apply_chat_template \
    "$PRECISION" --max_tokens_per_gpu 4096 "$@"
}

sft() {
  train sft sft --pretrain "$MODEL" --dataset "$SFT_TRAIN" --eval_dataset "$SFT_TEST" --input_key messages --multiturn \
    --max_len "$MAX_LEN" --max_samples "$SFT_SAMPLES" --max_epochs "$SFT_EPOCHS" --train_batch_size 8 --learning_rate 5e-5 --eval_at_start
}

rm_from_pairs() {
  train rm rm --pretrain "$OUT/sft/model" --dataset "$PAIRS_TRAIN" --eval_dataset "$PAIRS_TEST" --prompt_key prompt \
    --max_len "$MAX_LEN" --max_samples "$PAIRS" --max_epochs 1 --train_batch_size 8 --learning_rate 5e-5 --eval_at_start
}

ppo() {  # the server lives as long as this step; only who has the token may ask it
  TOGI_REWARD_TOKEN="$("$PYTHON" -c 'import secrets; print(secrets.token_hex(16))')"
  export TOGI_REWARD_TOKEN
  "$TOGI" serve-rm --reward_pretrain "$OUT/rm/model" --normalize_reward "$PRECISION" --max_len $((PROMPT_MAX_LEN + NEW_TOKENS)) \
    --max_tokens_per_gpu 4096 --host 127.0.0.1 --port 0 >"$OUT/serve-rm.log" 2>&1 &
  server=$!
  trap 'kill $server 2>/dev/null || :' EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  url="$("$PYTHON" "$here/../rlhf_chain.py" wait "$OUT/serve-rm.log" $server)"
  train rl ppo --pretrain "$OUT/sft/model" --critic_pretrain "$OUT/rm/model" --remote_rm_url "$url" --prompt_data "$OUT/prompts.jsonl" \
    --input_key prompt --advantage_estimator gae --init_kl_coef 0.02 --lambd 1 --actor_learning_rate 3e-5 --critic_learning_rate 5e-5 \
    --rollout_batch_size "$PPO_PROMPTS" --n_samples_per_prompt "$PPO_SAMPLES" --train_batch_size $(((PPO_PROMPTS * PPO_SAMPLES + 1) / 2)) \
    --num_episodes 100 --max_steps "$PPO_STEPS" --prompt_max_len "$PROMPT_MAX_LEN" --generate_max_len "$NEW_TOKENS" \
    --rollout_engine "$ENGINE" --colocate_all_models
  kill $server
  wait $server
  trap - EXIT
}

best_of_n() {  # best_of_n METHOD flags...
  method="$1"
  shift
  "$TOGI" iterate --method "$method" --pretrain "$OUT/sft/model" --reward_pretrain "$OUT/rm/model" --run_dir "$OUT/$method" \
    --prompt_data "$OUT/prompts.jsonl" --input_key prompt --apply_chat_template --rollout_engine "$ENGINE" "$PRECISION" \
    --rounds "$ROUNDS" --rollout_batch_size "$ROUND_PROMPTS" --best_of_n "$BEST_OF_N" "$CUT" --prompt_max_len "$PROMPT_MAX_LEN" \
    --max_new_tokens "$NEW_TOKENS" --max_len "$MAX_LEN" --max_tokens_per_gpu 4096 --train_batch_size 4 --max_epochs 2 "$@"
}

evaluate() {  # evaluate NAME MODEL: its outputs for the held-out prompts, and the reward model's scores of them
  task=generate_vllm
  [ "$ENGINE" = vllm ] || task=generate
  "$TOGI" infer --eval_task "$task" --pretrain "$2" --dataset "$OUT/held_out.jsonl" --input_key prompt --apply_chat_template \
    "$PRECISION" --best_of_n "$EVAL_SAMPLES" --prompt_max_len "$PROMPT_MAX_LEN" --max_new_tokens "$NEW_TOKENS" \
    --output_path "$OUT/eval_$1.jsonl"
  "$TOGI" infer --eval_task rm --pretrain "$OUT/rm/model" --normalize_reward --dataset "$OUT/eval_$1.jsonl" "$PRECISION" \
    --max_len $((PROMPT_MAX_LEN + NEW_TOKENS + 1)) --max_tokens_per_gpu 4096 --output_path "$OUT/scored_$1.jsonl"
}

model_of() {  # the folder of a model of the table
  case "$1" in
    start) echo "$MODEL" ;;
    sft | ppo) echo "$OUT/$1/model" ;;
    *) printf '%s/%s/round_%03d/model\n' "$OUT" "$1" "$ROUNDS" ;;
  esac
}

once sft sft
once rm rm_from_pairs
"$PYTHON" "$here/../rlhf_chain.py" prompts "$PAIRS_TRAIN" "$OUT/prompts.jsonl"
"$PYTHON" "$here/../rlhf_chain.py" prompts "$PAIRS_TEST" "$OUT/held_out.jsonl"
once ppo ppo
once dpo best_of_n dpo --learning_rate 2e-5 --beta 0.1
once rs best_of_n rs --learning_rate 3e-5
for name in $EVAL_MODELS; do
  once "eval_$name" evaluate "$name" "$(model_of "$name")"
done
# shellcheck disable=SC2086  # one word a model
"$PYTHON" "$here/../rlhf_chain.py" table "$OUT" $EVAL_MODELS
