"""Versions, imports, the choice of the device, checksums."""

from __future__ import annotations

import importlib
import os
import pkgutil
import subprocess
import sys

import torch

from gpu.tools import Figures

OWN = ("togi", "tests", "gpu", "comparison")


def versions(device: torch.device, small: bool) -> Figures:
    """The GPU and its driver, and whether every module of Togi can be imported with the packages that are here."""
    if device.type == "cuda":
        assert torch.cuda.is_available(), "torch finds no usable GPU: look at nvidia-smi, the driver, and torch's build"
        properties = torch.cuda.get_device_properties(device)
        yield "gpu", properties.name
        yield "capability", f"{properties.major}.{properties.minor}"
        yield "memory GB", properties.total_memory / 1e9
        yield "CUDA of torch", str(torch.version.cuda)
        yield "CUDA of the driver", str(torch._C._cuda_getDriverVersion())
        yield "NCCL", ".".join(map(str, torch.cuda.nccl.version()))
    import togi

    modules, absent, broken = 0, set[str](), list[str]()
    for module in pkgutil.walk_packages(togi.__path__, "togi.", onerror=lambda _: None):
        if module.name == "togi.__main__" or (small and not module.name.startswith(("togi.algo", "togi.model"))):
            continue
        modules += 1
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as missing:
            name = (missing.name or "").partition(".")[0]
            absent.add(name)
            if name in OWN:
                broken.append(f"{module.name} ({missing})")
        except Exception as problem:  # noqa: BLE001  whatever a module of this version does not bear
            broken.append(f"{module.name} ({problem})")
    yield "modules", modules
    yield "packages that are not here", ", ".join(sorted(absent)) or "none"
    assert not broken, f"{len(broken)} modules cannot be imported: {'; '.join(broken[:5])}"


def devices(device: torch.device, small: bool) -> Figures:
    """The device that Togi chooses, with the GPU and without it, and the checksum of weights on both."""
    from togi.device import default_device
    from togi.weights.buckets import Checksum, pack_buckets

    yield "default device", str(default_device())
    if device.type == "cuda":
        assert default_device() == torch.device("cuda", 0)
    question = "from togi.device import default_device as d; print(d())"
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", question], env=hidden, capture_output=True, text=True, timeout=60, check=True
    )
    yield "with no GPU visible", done.stdout.strip()
    torch.manual_seed(0)
    sizes = [1, 7, 8, 9, 63, 1021, 4097, 10**4 + 3 if small else 10**8 + 3]
    tensors = [(str(size), torch.randint(256, (size,), dtype=torch.uint8)) for size in sizes]
    digests = set[str]()
    for place in (torch.device("cpu"), device):
        checksum = Checksum()
        for bucket in pack_buckets(tensors, 4096, place):
            checksum.add(bucket.contents())
        digests.add(checksum.digest())
    assert len(digests) == 1, "the checksum of the same bytes differs between the CPU and the GPU"
    yield "checksums", "equal"
    assert done.stdout.strip() == "cpu", "a build for CUDA without a visible GPU must compute on the CPU"
