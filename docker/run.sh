#!/bin/sh
# Builds an image and runs a command in it: docker/run.sh togi rl --pretrain MODEL --prompt_data train.jsonl ...
# As you, not as root, with DATA (the current folder) as /data, where everything is read and written.
# Needs: Docker, and docker/nvidia_setup.sh once for GPUs. Change: KIND=cpu, DATA=..., SHM=..., NETWORK=host in the environment.
set -eu
root="$(cd "$(dirname "$0")/.." && pwd)"
KIND="${KIND:-cuda}"        # or cpu
DATA="${DATA:-$PWD}"
SHM="${SHM:-16g}"           # shared memory, where Ray keeps its objects
NETWORK="${NETWORK:-bridge}"  # or host: several nodes reach each other, by InfiniBand where there is any
INFINIBAND="${INFINIBAND:-/dev/infiniband}"
# GPUs and network cards read and write memory that is locked, of which Docker allows little
options="--gpus=all --ulimit=memlock=-1"
[ "$KIND" = cuda ] || options="--env=CUDA_VISIBLE_DEVICES="
if [ "$NETWORK" = host ] && [ -e "$INFINIBAND" ]; then options="$options --device=$INFINIBAND"; fi
docker build --file "$root/docker/$KIND.Dockerfile" --tag "togi:$KIND" "$root"
# shellcheck disable=SC2086  # several words
exec docker run --rm --init $options --network "$NETWORK" --user "$(id -u):$(id -g)" --env HOME=/data --shm-size "$SHM" \
  --volume "$DATA:/data" "togi:$KIND" "$@"
