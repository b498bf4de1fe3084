"""What the ranks of ``test_loading_ranks`` run: models that are read and sharded part by part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.learn_tools import max_difference, packs, partition_small_weights, rollouts, weights
from tests.tiny import tiny_tokenizer
from togi.config.choices import BackendName
from togi.learn.scorer import Scorer
from togi.model.checkpoint import save_trained
from togi.model.loading import ModelSource, load_causal_lm, load_scalar_model
from togi.model.policy import PolicyModel, ScalarModel
from togi.parallel import frozen, trainable
from togi.parallel.backend import BackendOptions
from togi.parallel.process import World
from togi.weights.files import Reader

POLICIES = ("llama", "qwen3_tied", "gemma3_text", "mixtral", "qwen3_moe")
SCALARS = ("scalar", "llama")
"""One with a head, one that gets a new one."""
SEED = 7


def load(folder: Path, name: str, *, scalar: bool, defer: bool) -> PolicyModel | ScalarModel:
    if not scalar:
        return load_causal_lm(ModelSource(str(folder / name), torch.float32, defer=defer))
    torch.manual_seed(SEED)
    return load_scalar_model(ModelSource(str(folder / name), torch.float32, defer=defer), init_head=name != "scalar")


def held_bytes(module: nn.Module) -> int:
    """The storages behind all parameters of this rank, whole ones where a view keeps them."""
    storages = [part.untyped_storage() for part in map(own_part, module.parameters()) if not part.is_meta]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def own_part(parameter: Tensor) -> Tensor:
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    return parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter


def watched(model: PolicyModel | ScalarModel) -> tuple[Reader, list[int]]:
    """Its reader, which notes what is held before and after each part is read."""
    seen: list[int] = []

    def look(part: nn.Module) -> None:
        seen.append(held_bytes(model))
        model.read(part)
        seen.append(held_bytes(model))

    return look, seen


def reads(world: World, folder: Path, name: str, *, scalar: bool, tensor_size: int = 1) -> None:
    """Load, look at the weights and at what was held, score, save; all of it left in a file."""
    if tensor_size > 1:
        world = world.in_teams(1, tensor_size)
    model = load(folder, name, scalar=scalar, defer=True)
    assert all(parameter.is_meta for parameter in model.parameters())
    read, seen = watched(model)
    backend = trainable(model, world, BackendOptions(bf16=False, zero_stage=3), read)
    seen.append(held_bytes(model))
    whole = weights(backend)
    result: dict[str, Any] = {"weights": whole, "held": seen, "total": sum(t.nbytes for t in whole.values())}
    batches = packs(rollouts(4), [4])
    scorer = Scorer(model, world)
    result["results"] = scorer.scores(batches) if scalar else scorer.logprobs(batches)
    kind = "scalar" if scalar else "policy"
    saved = folder / "saved" / f"{kind}_{name}_{tensor_size}"
    save_trained(saved if world.is_first else None, model, backend.full_parameters, tiny_tokenizer(), torch.float32)
    world.barrier("test")
    torch.save(result, folder / f"{kind}_{name}_{world.size}_{tensor_size}_{world.rank}.pt")


def scores_frozen(world: World, folder: Path) -> None:
    """A frozen model in bfloat16: sharded part by part it scores as one that was read at once."""
    model = load_causal_lm(ModelSource(str(folder / "llama"), torch.bfloat16, defer=True))
    options = BackendOptions(bf16=True, zero_stage=3)
    deferred = Scorer(model, world, frozen(model, world, options, model.read)).logprobs(packs(rollouts(4), [4]))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    at_once = load_causal_lm(ModelSource(str(folder / "llama"), torch.bfloat16))
    plain = Scorer(at_once, world, frozen(at_once, world, options)).logprobs(packs(rollouts(4), [4]))
    assert all((ours == theirs).all() for ours, theirs in zip(deferred, plain, strict=True))


def partitioned_by_deepspeed(world: World, folder: Path) -> None:
    """Stage 3 in bfloat16: masters are the weights of the files, unrounded; and no rank held all of them."""
    plain = dict(load(folder, "llama", scalar=False, defer=False).named_parameters())
    model = load(folder, "llama", scalar=False, defer=True)
    read, seen = watched(model)
    options = BackendOptions(bf16=True, zero_stage=3, backend=BackendName.DEEPSPEED)
    backend = trainable(model, world, options, read)
    assert max_difference(weights(backend), {name: p.detach() for name, p in plain.items()}) == 0.0
    total = sum(p.nbytes for p in plain.values())
    assert len(seen) == 2 * (12 + 1)
    assert max(seen) < 0.5 * total  # a half in bfloat16, and a part whole


def two_ranks(world: World, folder: Path) -> None:
    for name in POLICIES:
        reads(world, folder, name, scalar=False)
    for name in SCALARS:
        reads(world, folder, name, scalar=True)
    reads(world, folder, "llama", scalar=False, tensor_size=2)
    scores_frozen(world, folder)
    partition_small_weights()
    partitioned_by_deepspeed(world, folder)


def four_ranks(world: World, folder: Path) -> None:
    reads(world, folder, "llama", scalar=False)


def saved_tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")
