#!/bin/sh
# GSPO: one ratio a sequence, clipped in the narrow range of its paper (Zheng et al., 2025); two updates on each rollout.
set -eu
. "$(dirname "$0")/common.sh"
train --algo grpo --init_kl_coef 0 --n_samples_per_prompt 8 --policy_loss_type gspo --eps_clip_low_high 3e-4 4e-4 "$@"
