#!/bin/sh
# Supervised fine-tuning for a long run: a checkpoint every few steps, from which the same command with the same OUT goes on
# after any crash; the best model by held-out loss in checkpoints/best; a constant rate that falls at the end; rows tokenised
# in two processes and kept for the next run; more than 1 % of faulty rows stop it before training.
# Data: 48 conversations about sums (examples/data/chat).
# Needs: two cores and 4 GB of memory as it is; a GPU is used where there is one.
# Change: MODEL, DATA and OUT in the environment (common_offline.sh), any flag of togi sft after the script's name.
set -eu
. "$(dirname "$0")/common_offline.sh"
train sft chat --input_key messages --apply_chat_template --multiturn --learning_rate 2e-5 \
  --save_steps 2 --load_checkpoint --eval_steps 2 --best_metric_key eval/loss --dataset_num_proc 2 --max_bad_rows 0.01 \
  --lr_scheduler warmup_stable_decay --lr_decay_ratio 0.2 --min_lr_ratio 0 "$@"
