#!/bin/sh
# REINFORCE++-baseline: group mean as baseline, batch normalisation, a k2 KL loss.
set -eu
. "$(dirname "$0")/common.sh"
train --advantage_estimator reinforce_baseline --n_samples_per_prompt 8 --use_kl_loss --kl_estimator k2 --init_kl_coef 1e-3 "$@"
