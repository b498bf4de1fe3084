"""Where a process computes, as torch's CUDA build would answer."""

from __future__ import annotations

import ast
import os
from unittest.mock import patch

import pytest
import torch

from tests.source import trees
from togi.device import default_device


@pytest.mark.parametrize(("usable", "device"), [(True, "cuda:3"), (False, "cpu")])
def test_a_cuda_build_without_a_usable_gpu_computes_on_the_cpu(usable: bool, device: str) -> None:
    with (
        patch.object(torch._C, "_accelerator_getAccelerator", lambda: torch.device("cuda")),
        patch.object(torch.cuda, "is_available", lambda: usable),
    ):
        assert default_device(3) == torch.device(device)


def test_gpus_are_counted_without_starting_cuda() -> None:
    """CUDA that has started makes forked processes useless, and would not see a later CUDA_VISIBLE_DEVICES."""
    assert os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] == "1"
    with (
        patch.object(torch.cuda, "_is_compiled", lambda: True),
        patch.object(torch.cuda, "_device_count_nvml", lambda: 2),
        patch.object(torch._C, "_cuda_getDeviceCount", lambda: pytest.fail("starts CUDA"), create=True),
        patch.object(torch._C, "_accelerator_getAccelerator", lambda: torch.device("cuda")),
    ):
        assert default_device() == torch.device("cuda:0")


def test_torch_is_asked_in_one_place() -> None:
    asked = [
        path
        for path, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "current_accelerator"
    ]
    assert asked == ["device.py"]
