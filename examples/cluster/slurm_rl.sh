#!/bin/bash
# Online RL on several SLURM nodes: a Ray head on the first, a Ray worker on each other one, then the command on the first.
#   sbatch examples/cluster/slurm_rl.sh --pretrain MODEL --prompt_data train.jsonl --input_key prompt --label_key answer \
#     --apply_chat_template --reward_func reward.py --actor_num_nodes 2 --actor_num_gpus_per_node 8 --colocate_all_models
# Data: whatever the flags name. The checkout, its .venv, models and data lie on a file system that all nodes share.
# Needs: NODES x GPUS_PER_NODE GPUs, at least as many as the placement of the command adds up to; it says so before it starts.
# Change: the #SBATCH lines and the variables below. Ray uses each node's own address in the cluster, has no dashboard here, and
#   takes orders only from who knows this job's token; its traffic is not encrypted.
#SBATCH --job-name=togi-rl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=togi-rl-%j.log
set -euo pipefail
ulimit -Sl "$(ulimit -Hl)"                           # InfiniBand locks memory; srun passes limits on
ulimit -Sn 65536 || true                             # Ray opens many connections
GPUS_PER_NODE="${GPUS_PER_NODE:-8}"                  # GPUs of each node; without any, how many workers it may hold
CPUS_PER_NODE="${CPUS_PER_NODE:-${SLURM_CPUS_PER_TASK:-64}}"
PORT="${PORT:-6379}"                                 # of Ray, on the first node
WAIT="${WAIT:-300}"                                  # seconds within which all nodes must have joined
BIN="${BIN:-$PWD/.venv/bin}"
RUN="${RUN:-$PWD/runs/slurm-$SLURM_JOB_ID}"
export GPUS_PER_NODE CPUS_PER_NODE PORT BIN
export SRUN_CPUS_PER_TASK="$CPUS_PER_NODE"           # a step does not take it over from the job
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
RAY_AUTH_TOKEN="$("$BIN/python" -c 'import secrets; print(secrets.token_hex(32))')"
export RAY_AUTH_TOKEN

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
on=(srun --nodes=1 --ntasks=1 --overlap --nodelist)   # then a node and a command: it runs beside what runs there already
address_of() {  # the first address of a node
  "${on[@]}" "$1" hostname -I | awk '{ print $1 }'
}

started=()
finish() {  # end the Ray processes that this script started, and only them
  for step in "${started[@]}"; do kill "$step" 2>/dev/null || true; done
  wait || true
}
trap finish EXIT

head="$(address_of "${nodes[0]}")"
export RAY_ADDRESS="$head:$PORT"
echo "Ray head: ${nodes[0]} ($RAY_ADDRESS)"
"${on[@]}" "${nodes[0]}" "$BIN/ray" start --head --node-ip-address="$head" --port="$PORT" --num-gpus="$GPUS_PER_NODE" \
  --num-cpus="$CPUS_PER_NODE" --include-dashboard=false --block &
started+=($!)
for node in "${nodes[@]:1}"; do
  "${on[@]}" "$node" "$BIN/ray" start --address="$RAY_ADDRESS" --node-ip-address="$(address_of "$node")" \
    --num-gpus="$GPUS_PER_NODE" --num-cpus="$CPUS_PER_NODE" --block &
  started+=($!)
done

# Nothing is placed before every node has joined.
"${on[@]}" "${nodes[0]}" "$BIN/python" - "${#nodes[@]}" "$WAIT" <<'PYTHON'
import sys, time
import ray

wanted, deadline = int(sys.argv[1]), time.monotonic() + float(sys.argv[2])
alive = 0
while alive < wanted:
    if time.monotonic() > deadline:
        sys.exit(f"only {alive} of {wanted} nodes joined Ray within {sys.argv[2]} s")
    try:
        if not ray.is_initialized():
            ray.init(log_to_driver=False, logging_level="ERROR")
        alive = sum(node["Alive"] for node in ray.nodes())
    except ConnectionError:  # the head is not up yet
        pass
    time.sleep(1)
print(f"Ray: {alive} nodes, {int(ray.cluster_resources().get('GPU', 0))} GPUs", flush=True)
PYTHON

"${on[@]}" "${nodes[0]}" "$BIN/togi" rl --run_dir "$RUN" --save_path "$RUN/model" --ckpt_path "$RUN/checkpoints" "$@"
