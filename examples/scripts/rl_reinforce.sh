#!/bin/sh
# REINFORCE++: no critic, no groups, advantages normalised over the whole batch (Hu, 2025).
set -eu
. "$(dirname "$0")/common.sh"
train --advantage_estimator reinforce --n_samples_per_prompt 4 --init_kl_coef 1e-4 "$@"
