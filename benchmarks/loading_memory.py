"""What the process of a rank grows by while a model is loaded and sharded (ZeRO stage 3), by the number of ranks.

    python benchmarks/loading_memory.py [RANKS ...]

A random model of 24 layers, float32, on the CPU, with AdamW's moments and without. "at once" reads the whole model on each rank
before it is sharded, "in parts" as training does. "moments" are two more copies of the shards.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.learn_tools import run_ranks
from togi.model.loading import ModelSource, load_causal_lm
from togi.parallel import frozen, trainable
from togi.parallel.backend import BackendOptions
from togi.parallel.process import World

MIB = 2**20


def resident(kind: str) -> float:
    """VmRSS of this process now, or VmHWM, its largest so far, in MiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{kind}:")) / 1024


def measure(world: World, folder: Path) -> None:
    """Load in the way that the file ``way`` names; the first rank prints what each rank took."""
    defer, trains = ((folder / "way").read_text() == "in parts"), (folder / "trains").exists()
    options, before = BackendOptions(bf16=False, zero_stage=3), resident("VmRSS")
    model = load_causal_lm(ModelSource(str(folder / "model"), torch.float32, defer=defer))
    if trains:
        trainable(model, world, options, model.read)
    else:
        frozen(model, world, options, model.read)
    grown = world.gather("results", resident("VmHWM") - before)
    if world.is_first:
        what = "weights and moments" if trains else "weights"
        print(
            f"{world.size} ranks, {what}, {'in parts' if defer else 'at once'}: "
            f"{', '.join(f'{one:.0f}' for one in grown)} MiB",
            flush=True,
        )


def make_model(folder: Path) -> float:
    """Write it; returns its size in MiB."""
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=24,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=4096,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / "model")
    return sum(p.nbytes for p in model.parameters()) / MIB


if __name__ == "__main__":
    with TemporaryDirectory() as name:
        target = Path(name)
        print(f"the model has {make_model(target):.0f} MiB", flush=True)
        for ranks in [int(word) for word in sys.argv[1:]] or [2, 4]:
            for trained in (False, True):
                (target / "trains").unlink(missing_ok=True)
                if trained:
                    (target / "trains").touch()
                for way in ("at once", "in parts"):
                    (target / "way").write_text(way)
                    run_ranks(measure, ranks, target)
