#!/bin/sh
# GRPO: rewards normalised within the group, a k3 KL loss (Shao et al., 2024).
set -eu
. "$(dirname "$0")/common.sh"
train --advantage_estimator group_norm --n_samples_per_prompt 8 --use_kl_loss --kl_estimator k3 --init_kl_coef 1e-3 "$@"
