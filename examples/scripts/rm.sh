#!/bin/sh
# A reward model from preference pairs (Bradley-Terry); loads with AutoModelForSequenceClassification.
set -eu
. "$(dirname "$0")/common_offline.sh"
train rm pairs --prompt_key prompt --apply_chat_template --learning_rate 1e-5 "$@"
