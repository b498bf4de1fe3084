#!/bin/sh
# Supervised fine-tuning on conversations that call a tool. The rows are as rows come: OpenAI's form, ShareGPT's, lists written as
# text, content in parts, calls with arguments as text. All are read into one form, and what was read otherwise is counted.
# Data: 36 conversations about sums with a tool that adds (examples/data/tools), and a chat template that shows tools and calls.
# Needs: two cores and 4 GB of memory as it is; a GPU is used where there is one.
# Change: MODEL, DATA, TEMPLATE and OUT in the environment (common_offline.sh), any flag of togi sft after the script's name.
set -eu
. "$(dirname "$0")/common_offline.sh"
TEMPLATE="${TEMPLATE:-$here/../data/tools/template.jinja}"
train sft tools --input_key messages --apply_chat_template --tokenizer_chat_template "$(cat "$TEMPLATE")" --multiturn \
  --learning_rate 2e-5 "$@"
