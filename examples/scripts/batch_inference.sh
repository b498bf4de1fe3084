#!/bin/sh
# Four outputs for each prompt, a reward for each output (RM: a reward model, such as examples/scripts/rm.sh trains), and of
# each prompt the best one. Flags after the script's name are for the generation.
# Data: 48 sums (examples/data/pairs); nothing is trained.
# Needs: two cores and 6 GB of memory as it is; a GPU is used where there is one.
# Change: MODEL, RM, DATA, INPUT_KEY and OUT in the environment (common_best_of_n.sh), TASK=generate to do without vLLM.
set -eu
. "$(dirname "$0")/common_best_of_n.sh"
RM="${RM:?set RM to the folder of a reward model, such as examples/scripts/rm.sh writes}"
"${TOGI:-togi}" infer --eval_task "${TASK:-generate_vllm}" \
  --pretrain "$MODEL" --dataset "$DATA" --input_key "$INPUT_KEY" --apply_chat_template --bf16 \
  --best_of_n 4 --temperature 0.9 --prompt_max_len 256 --max_new_tokens 64 --output_path "$OUT/generated.jsonl" "$@"
"${TOGI:-togi}" infer --eval_task rm --pretrain "$RM" --dataset "$OUT/generated.jsonl" --max_len 512 \
  --post_processor rs --output_path "$OUT/best.jsonl"
