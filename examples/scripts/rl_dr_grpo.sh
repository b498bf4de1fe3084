#!/bin/sh
# Dr. GRPO: GRPO without the division by the deviation and by the response length (Liu et al., 2025).
set -eu
. "$(dirname "$0")/common.sh"
train --advantage_estimator dr_grpo --n_samples_per_prompt 8 --init_kl_coef 0 "$@"
