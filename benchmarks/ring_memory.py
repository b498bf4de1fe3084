"""What a rank keeps for the backward pass, by the size of its ring, and the largest size of its process.

    python benchmarks/ring_memory.py [TOKENS] [RING ...]

One sequence through a random model of 8 layers, forward and backward, float32, on the CPU. "kept" is the sum over the tensors
that autograd saved, weights left out; "process" is what the largest resident size grew by over that before the forward.
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from tempfile import mkdtemp

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.learn_tools import run_ranks
from tests.packs import plain_pack
from togi.model.attention import SEGMENTS
from togi.model.policy import Needs, PolicyModel
from togi.parallel.groups import Ring
from togi.parallel.process import World

MIB = 2**20


def measure(world: World, folder: Path) -> None:
    """One forward and backward; the first rank prints what it took on every rank."""
    tokens = int((folder / "tokens").read_text())
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=512,
        max_position_embeddings=tokens,
    )
    model = PolicyModel(AutoModelForCausalLM.from_config(config, attn_implementation=SEGMENTS))
    if world.size > 1:
        model.join_ring(Ring(world.in_teams(world.size)), 4)
    batch = plain_pack([([1], [torch.randint(512, (tokens - 1,)).tolist()])])
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(batch, Needs(logprobs=True)).logprobs_K.sum()
    loss.backward()
    seconds = time.perf_counter() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    rows = world.gather("results", (sum(kept.values()) / MIB, grown / MIB))
    if world.is_first:
        shown = "  ".join(f"kept {saved:.0f} MiB, process {process:.0f} MiB" for saved, process in rows)
        print(f"ring {world.size}: {seconds:.1f} s   {shown}", flush=True)


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:]] or [8192]
    target = Path(mkdtemp())
    (target / "tokens").write_text(str(numbers[0]))
    for size in numbers[1:] or [1, 2, 4]:
        run_ranks(measure, size, target)
