#!/bin/sh
# A conversation with a model in the terminal; "clear" starts anew, "exit" ends. Nothing is trained.
# Data: what you type.
# Needs: one core and 2 GB of memory as it is; a GPU is used where there is one.
# Change: MODEL in the environment, any flag of togi chat after the script's name.
set -eu
cache="${TOGI_CACHE:-$HOME/.cache/togi}"
"${TOGI:-togi}" chat --pretrain "${MODEL:-$cache/smollm2-135m-instruct}" --bf16 "$@"
