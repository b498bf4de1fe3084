# Sourced by the scripts beside it for best-of-n. The environment chooses model, prompts and reward:
#   MODEL=... DATA=... INPUT_KEY=... LABEL_KEY=... REWARD=... ENGINE=transformers OUT=... examples/scripts/rejection_sampling.sh
# Without them: the model of examples/demo/prepare.py, the tiny sums of examples/data/pairs, and whether the last number of an
# answer is right. DATA is a folder with the splits train and test, or one file. Flags after the script's name win. A stopped script goes on when OUT names the same folder.
here="$(cd "$(dirname "$0")" && pwd)"
cache="${TOGI_CACHE:-$HOME/.cache/togi}"
MODEL="${MODEL:-$cache/smollm2-135m-instruct}"
DATA="${DATA:-$here/../data/pairs}"
INPUT_KEY="${INPUT_KEY:-prompt}"
LABEL_KEY="${LABEL_KEY:-chosen}"
REWARD="${REWARD:-$here/../rewards/math_reward.py}"
OUT="${OUT:-runs/$(basename "$0" .sh)-$(date +%Y%m%d-%H%M%S)}"

iterate() {  # iterate METHOD flags...
  method="$1"
  shift
  "${TOGI:-togi}" iterate --method "$method" \
    --pretrain "$MODEL" --prompt_data "$DATA" --input_key "$INPUT_KEY" --label_key "$LABEL_KEY" --apply_chat_template \
    --reward_func "$REWARD" --eval_dataset "$DATA" --eval_split test --eval_n_samples_per_prompt 2 --run_dir "$OUT" \
    --rollout_engine "${ENGINE:-vllm}" --bf16 --rounds 2 --rollout_batch_size 16 --best_of_n 4 --prompt_max_len 256 \
    --max_new_tokens 64 --max_len 512 --max_tokens_per_gpu 4096 --train_batch_size 8 "$@"
}
