#!/bin/sh
# Builds an image and runs a command in it: docker/run.sh togi rl --pretrain MODEL --prompt_data train.jsonl ...
# As you, not as root, with DATA (the current folder) as /data, where everything is read and written.
# Needs: Docker, and docker/nvidia_setup.sh once for GPUs. Change: KIND=cpu, DATA=..., SHM=... in the environment.
set -eu
root="$(cd "$(dirname "$0")/.." && pwd)"
KIND="${KIND:-cuda}"        # or cpu
DATA="${DATA:-$PWD}"
SHM="${SHM:-16g}"           # shared memory, where Ray keeps its objects
gpus="--gpus=all"
[ "$KIND" = cuda ] || gpus="--env=CUDA_VISIBLE_DEVICES="
docker build --file "$root/docker/$KIND.Dockerfile" --tag "togi:$KIND" "$root"
exec docker run --rm --init "$gpus" --user "$(id -u):$(id -g)" --env HOME=/data --shm-size "$SHM" \
  --volume "$DATA:/data" "togi:$KIND" "$@"
