# Sourced by the scripts beside it for training on fixed data. The environment chooses model and rows:
#   MODEL=... DATA=... OUT=... examples/scripts/sft.sh --bf16 --max_epochs 3
# Without MODEL: the model of examples/demo/prepare.py. Without DATA: a folder of examples/data, tiny sets of sums that show
# the fields; DATA must have the same fields and the splits train and test. Flags after the script's name win.
here="$(cd "$(dirname "$0")" && pwd)"
cache="${TOGI_CACHE:-$HOME/.cache/togi}"
MODEL="${MODEL:-$cache/smollm2-135m-instruct}"
OUT="${OUT:-runs/$(basename "$0" .sh)-$(date +%Y%m%d-%H%M%S)}"

train() {  # train COMMAND ROWS flags...
  command="$1" rows="${DATA:-$here/../data/$2}"
  shift 2
  "${TOGI:-togi}" "$command" \
    --pretrain "$MODEL" --dataset "$rows" --eval_dataset "$rows" --eval_split test --eval_at_start \
    --run_dir "$OUT" --save_path "$OUT/model" --ckpt_path "$OUT/checkpoints" \
    --bf16 --max_len 512 --max_tokens_per_gpu 4096 --train_batch_size 16 --max_epochs 2 "$@"
}

in_processes() {  # TOGI=in_processes: PROCESSES of torchrun in the place of one
  command="$1"
  shift
  "${TORCHRUN:-torchrun}" --standalone --nproc_per_node "$PROCESSES" -m togi "$command" "$@"
}
