#!/bin/sh
# Continued pre-training: plain text, every token in the loss, no template and no end token.
# Data: 48 lines of text with sums (examples/data/text).
# Needs: two cores and 4 GB of memory as it is; a GPU is used where there is one.
# Change: MODEL, DATA and OUT in the environment (common_offline.sh), any flag of togi sft after the script's name.
set -eu
. "$(dirname "$0")/common_offline.sh"
train sft text --input_key text --pretrain_mode --learning_rate 1e-5 "$@"
