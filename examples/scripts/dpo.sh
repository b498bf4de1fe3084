#!/bin/sh
# DPO (Rafailov et al., 2023); --label_smoothing 0.1 is cDPO, --ipo is IPO. A prompt is computed once for both answers.
set -eu
. "$(dirname "$0")/common_offline.sh"
train dpo pairs --prompt_key prompt --apply_chat_template --beta 0.1 --learning_rate 5e-6 "$@"
