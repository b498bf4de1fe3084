#!/bin/sh
# DPO with compiled layers and activations bounded by a token budget: torch.compile builds the layers at the first packs (kept
# for later runs; the metric compile/seconds says how long that took), and of larger packs so many layers recompute in the
# backward that no pack keeps more than 2,048 tokens do. For GPUs; on a CPU Togi's own kernels are as fast without the wait.
# Data: 48 pairs of a right and a wrong sum (examples/data/pairs).
# Needs: two cores and 4 GB of memory as it is; a GPU is used where there is one.
# Change: MODEL, DATA and OUT in the environment (common_offline.sh), any flag of togi dpo after the script's name.
set -eu
. "$(dirname "$0")/common_offline.sh"
train dpo pairs --prompt_key prompt --apply_chat_template --beta 0.1 --learning_rate 5e-6 \
  --torch_compile --gradient_checkpointing --gradient_checkpointing_above 2048 "$@"
