#!/bin/sh
# PPO of a model of 70 billion weights against a reward model of its size, in three groups of GPUs: engines, actor with
# reference, critic with reward model. Start it on the first node of a Ray cluster with RAY_ADDRESS set, as
# examples/cluster/slurm_rl.sh does.
# Data: one-digit sums (examples/demo/prepare.py); DATA must name a real set of prompts.
# Needs: RM, such as rm.sh trains from MODEL; 6 nodes of 8 GPUs of 80 GB with 1 TB of host memory each: 2 for each group. Adam
#   is in host memory, 12 bytes a weight; weights and gradients take 28 GB of a GPU. Computed, not measured; the tests run the
#   same flags with tiny models, one worker for each.
# Change: NODES, GPUS, ENGINES, TP, MODEL, RM, DATA and OUT in the environment, any flag of togi rl after the script's name.
set -eu
MODEL="${MODEL:-Qwen/Qwen2.5-72B-Instruct}"
. "$(dirname "$0")/common.sh"
RM="${RM:?set RM to the folder of a reward model, such as examples/scripts/rm.sh writes}"
NODES="${NODES:-2}" GPUS="${GPUS:-8}"      # of actor with reference, and of critic with reward model
ENGINES="${ENGINES:-4}" TP="${TP:-4}"      # ENGINES x TP GPUs generate
rl --reward_pretrain "$RM" --normalize_reward --colocate_actor_ref --colocate_critic_reward \
  --actor_num_nodes "$NODES" --actor_num_gpus_per_node "$GPUS" --ref_num_nodes "$NODES" --ref_num_gpus_per_node "$GPUS" \
  --critic_num_nodes "$NODES" --critic_num_gpus_per_node "$GPUS" --reward_num_nodes "$NODES" \
  --reward_num_gpus_per_node "$GPUS" --vllm_num_engines "$ENGINES" --vllm_tensor_parallel_size "$TP" \
  --zero_stage 3 --adam_offload --ref_reward_offload --gradient_checkpointing --flash_attn \
  --rollout_batch_size 1024 --train_batch_size 128 --n_samples_per_prompt 1 --prompt_max_len 1024 --generate_max_len 1024 \
  --max_tokens_per_gpu 8192 --advantage_estimator gae --init_kl_coef 0.01 --lambd 0.95 --actor_learning_rate 5e-7 \
  --critic_learning_rate 9e-6 --save_steps 20 --load_checkpoint "$@"
