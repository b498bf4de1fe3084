#!/bin/sh
# KTO: single answers labelled desirable or not (Ethayarajh et al., 2024).
set -eu
. "$(dirname "$0")/common_offline.sh"
train kto labelled --input_key prompt --output_key response --apply_chat_template --beta 0.1 --learning_rate 5e-6 "$@"
