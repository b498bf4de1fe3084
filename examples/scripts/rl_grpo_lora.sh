#!/bin/sh
# GRPO of a LoRA adapter: the frozen base is the reference, engines get merged weights. --load_in_4bit makes it QLoRA.
set -eu
. "$(dirname "$0")/common.sh"
train --advantage_estimator group_norm --n_samples_per_prompt 8 --use_kl_loss --kl_estimator k3 --init_kl_coef 1e-3 \
  --lora_rank 16 --lora_alpha 32 --actor_learning_rate 1e-4 "$@"
