"""``python -m tests.equal.liger_job ARCH...``: models with Liger's kernels beside the same without, on Triton's interpreter.

Prints, for each architecture, the largest difference in log-probs, entropy and any gradient, each as a share of the largest
entry, and how many layers Liger computes. The interpreter is chosen when Triton is imported, hence a process of its own.
"""

import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from tests.packs import GROUPS, packed, shared_pack
from tests.tiny import save_tiny_model
from togi.config.choices import Layers
from togi.model.loading import ModelSource, load_causal_lm

convert = interpreter._implicit_cvt


def convert_floats_too(argument: Any) -> Any:
    """Compiled kernels get a Python float as a float32; the interpreter leaves it as it is."""
    if isinstance(argument, float):
        handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)
    return convert(argument)


@triton.jit
def rsqrt(x):
    """CUDA's library, which Liger calls, is not there on the interpreter."""
    return 1.0 / tl.sqrt(x)


def gap(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-12))


def is_ligers(module: torch.nn.Module) -> bool:
    """Whether the forward that is bound to the layer comes from Liger."""
    return "Liger" in module.forward.__qualname__


def main() -> None:
    interpreter._implicit_cvt = convert_floats_too
    import liger_kernel.ops.rms_norm

    liger_kernel.ops.rms_norm.rsqrt = rsqrt
    batch = shared_pack(GROUPS)
    for arch in sys.argv[1:]:
        with TemporaryDirectory() as folder:
            save_tiny_model(Path(folder), arch=arch)
            one = packed(load_causal_lm(ModelSource(folder, torch.float32)), batch)
            model = load_causal_lm(ModelSource(folder, torch.float32, layers=Layers.LIGER))
        other = packed(model, batch)
        assert one[2].keys() == other[2].keys()
        gaps = {
            "logprobs": gap(other[0], one[0]),
            "entropy": gap(other[1], one[1]),
            "gradients": max(gap(other[2][name], gradient) for name, gradient in one[2].items()),
            "layers": sum(map(is_ligers, model.modules())),
        }
        print(json.dumps({arch: gaps}))


if __name__ == "__main__":
    main()
