#!/bin/sh
# A reward model behind HTTP, for rl_ppo_remote_rm.sh: POST /get_reward, GET /health, GET /metrics. Nothing is trained.
# It listens on this machine only. For others give --host with a private address and put a secret into TOGI_REWARD_TOKEN on
# both sides: without one the address is refused.
# Data: what it is asked for.
# Needs: RM, the folder of a reward model such as rm.sh writes; one core and 2 GB of memory for a model of 135 million weights.
# Change: RM and PORT in the environment, any flag of togi serve-rm after the script's name.
set -eu
RM="${RM:?set RM to the folder of a reward model, such as examples/scripts/rm.sh writes}"
exec "${TOGI:-togi}" serve-rm --reward_pretrain "$RM" --port "${PORT:-5000}" --normalize_reward --bf16 "$@"
