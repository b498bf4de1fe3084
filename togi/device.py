"""Where this process computes."""

from __future__ import annotations

import os

import torch

# torch then counts GPUs by the driver's management library. Otherwise the count itself starts CUDA: processes that are forked
# later, such as the workers of a tensor-parallel engine, could not use it.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")


def default_device(local_rank: int = 0) -> torch.device:
    """The accelerator of this process, or the CPU if there is none that works now.

    A CUDA build of torch names CUDA without a driver too, and when CUDA_VISIBLE_DEVICES is empty. From then on CUDA multiplies
    float32 matrices in TF32 (10 bits of mantissa where bfloat16 has 7, several times the speed of float32), unless algorithms are
    deterministic.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and accelerator.type == "cuda" and not torch.are_deterministic_algorithms_enabled():
        torch.set_float32_matmul_precision("high")
    return torch.device("cpu") if accelerator is None else torch.device(accelerator.type, local_rank)
