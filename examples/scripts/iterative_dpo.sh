#!/bin/sh
# Iterative DPO: each round prefers the best of several outputs to the worst; equally good ones make no pair.
set -eu
. "$(dirname "$0")/common_best_of_n.sh"
iterate dpo --best_of_n 8 --learning_rate 2e-6 --beta 0.1 "$@"
