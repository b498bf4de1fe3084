#!/bin/sh
# Lets Docker give containers the NVIDIA GPUs of this host: installs NVIDIA's container toolkit and makes it known to Docker.
# Needs: Debian or Ubuntu, root through sudo, Docker, and an NVIDIA driver that works (nvidia-smi). Running it again does no harm.
# Not run in the project's tests but with stand-ins for these programs: they have neither Docker nor a GPU.
set -eu
site=https://nvidia.github.io/libnvidia-container
key=/usr/share/keyrings/nvidia-container-toolkit.gpg
list=/etc/apt/sources.list.d/nvidia-container-toolkit.list
for program in nvidia-smi docker curl gpg apt-get; do
  command -v "$program" >/dev/null || { echo "$program is missing: install it first" >&2; exit 1; }
done
nvidia-smi >/dev/null || { echo "nvidia-smi fails: mend the NVIDIA driver first" >&2; exit 1; }

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
curl --fail --silent --show-error --location "$site/gpgkey" --output "$work/key"
gpg --batch --yes --dearmor --output "$work/key.gpg" "$work/key"
echo "deb [signed-by=$key] $site/stable/deb/\$(ARCH) /" >"$work/list"
sudo install -m 644 "$work/key.gpg" "$key"
sudo install -m 644 "$work/list" "$list"
sudo apt-get update
sudo apt-get install -y nvidia-container-toolkit
sudo nvidia-ctk runtime configure --runtime=docker
sudo systemctl restart docker
docker run --rm --gpus all ubuntu:24.04 nvidia-smi
echo "containers can use the GPUs now: docker/run.sh togi --help"
