#!/bin/sh
# Conditional SFT: each round learns every output with its reward told in the prompt, and the next one asks for a high reward.
# The reward's line ends with a line break: many tokenizers join a space, as in the default, to the first word of the answer.
# Data: 48 sums (examples/data/pairs), scored by examples/rewards/math_reward.py.
# Needs: two cores and 6 GB of memory as it is; a GPU is used where there is one.
# Change: MODEL, DATA, REWARD, ENGINE and OUT in the environment (common_best_of_n.sh), flags of togi iterate after
#   the name.
set -eu
. "$(dirname "$0")/common_best_of_n.sh"
iterate csft --csft_prompt 1.00 --learning_rate 5e-6 --reward_template "{input} <rm_score>: {reward}
" "$@"
