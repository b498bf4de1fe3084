#!/bin/bash
# A command on fixed data (sft, rm, dpo, kto, prm, kd) on several SLURM nodes: one torchrun on each of them.
#   sbatch examples/cluster/slurm_train.sh sft --pretrain MODEL --dataset chats.jsonl --input_key messages --apply_chat_template
# Data: whatever the flags name. The checkout, its .venv, models, data and TOGI_CACHE lie on a file system that all nodes share.
# Needs: NODES x GPUS_PER_NODE GPUs. Without GPUs the processes compute on the CPU.
# Change: the #SBATCH lines and the variables below. The meeting place of the processes listens on every address of the first
#   node, as torch's does everywhere: run it in a network that is closed to others.
#SBATCH --job-name=togi
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=togi-%j.log
set -euo pipefail
ulimit -Sl "$(ulimit -Hl)"                           # InfiniBand locks memory; srun passes limits on
GPUS_PER_NODE="${GPUS_PER_NODE:-8}"                  # processes on each node
PORT="${PORT:-29500}"                                # where they meet, on the first node
TORCHRUN="${TORCHRUN:-$PWD/.venv/bin/torchrun}"
TOGI_CACHE="${TOGI_CACHE:-$PWD/.cache/togi}"         # on the shared file system
RUN="${RUN:-$PWD/runs/slurm-$SLURM_JOB_ID}"
export TORCHRUN TOGI_CACHE
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-64}"   # a step does not take it over from the job

command="${1:?name the command: sft, rm, dpo, simpo, orpo, kto, prm or kd}"
shift
first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
echo "$SLURM_JOB_NUM_NODES nodes x $GPUS_PER_NODE processes meet at $first:$PORT"
# One torchrun for each node; SLURM_NODEID is that node's number and known only there.
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 \
  bash -c 'exec "$TORCHRUN" --node_rank "$SLURM_NODEID" "$@"' torchrun \
  --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node "$GPUS_PER_NODE" --master_addr "$first" --master_port "$PORT" \
  -m togi "$command" --run_dir "$RUN" --save_path "$RUN/model" --ckpt_path "$RUN/checkpoints" "$@"
