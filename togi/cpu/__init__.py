"""Code that exists only for speed on CPUs. Training on GPUs does not use it.

It has C kernels for norms, gates, attention, the head's softmax and AdamW, built by the machine's own compiler; the layers and the
attention that call them, with PyTorch operations as the fallback without a compiler; linear layers in oneDNN's weight layout.
Every result equals that of the plain path (``tests/unit``). Other packages import from here, never from the modules within.
"""

from togi.cpu.attention import host_attention
from togi.cpu.kernels import HostKernels, Rates, compiled, is_plain, kernels_for, own_folder, processor_mark
from togi.cpu.layers import keeping_outputs, pack_linears, use_host_layers

__all__ = [
    "HostKernels",
    "Rates",
    "compiled",
    "host_attention",
    "is_plain",
    "keeping_outputs",
    "kernels_for",
    "own_folder",
    "pack_linears",
    "processor_mark",
    "use_host_layers",
]
