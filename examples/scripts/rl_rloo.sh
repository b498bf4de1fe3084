#!/bin/sh
# RLOO: the baseline of a response is the mean reward of its siblings (Ahmadian et al., 2024).
set -eu
. "$(dirname "$0")/common.sh"
train --advantage_estimator rloo --n_samples_per_prompt 4 --init_kl_coef 1e-3 "$@"
