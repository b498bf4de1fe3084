# Togi for NVIDIA GPUs. torch's and vLLM's wheels bring CUDA with them; the driver comes from the host (docker/nvidia_setup.sh).
#   docker build -f docker/cuda.Dockerfile -t togi:cuda .
# Not built in the project's tests, which have no Docker: they check what can be read here.
FROM python:3.11-slim-bookworm

# make and a compiler: for packages that come as source, and for kernels that are compiled when they are first used
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 togi \
    && mkdir -p /opt/togi /data \
    && chown togi:togi /opt/togi /data
USER togi
WORKDIR /opt/togi

COPY --chown=togi:togi pyproject.toml README.md LICENSE ./
COPY --chown=togi:togi requirements requirements
COPY --chown=togi:togi scripts scripts
COPY --chown=togi:togi togi togi
COPY --chown=togi:togi examples examples
RUN python scripts/setup.py .venv --gpu \
    && rm -rf /home/togi/.cache

ENV PATH=/opt/togi/.venv/bin:$PATH \
    TOGI_CACHE=/data/cache \
    HF_HOME=/data/huggingface \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /data
CMD ["togi", "--help"]
