"""``--torch_compile``: Inductor's layers = the layers as they are, in outputs and gradients, for packs of any size."""

import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.packs import random_groups, shared_pack
from tests.tiny import save_tiny_model
from togi.config.choices import Layers
from togi.config.shared import LoRA, Recompute
from togi.errors import ModelError
from togi.model.compiled_layers import TESTED, clock
from togi.model.loading import load_causal_lm
from togi.model.outputs import Needs
from togi.model.policy import PolicyModel

NEEDS = Needs(logprobs=True, entropy=True)
PACKS = [
    shared_pack(random_groups(seed, shapes))
    for seed, shapes in enumerate([[(5, [3, 4, 2]), (7, [2])], [(9, [6, 6])], [(4, [3]), (5, [2]), (11, [3, 9])]])
]


def results(model: PolicyModel) -> list[Tensor]:
    """Log-probs and entropies of every pack, in training and without gradients, then the gradient of each parameter."""
    found = []
    for batch in PACKS:
        outputs = model(batch, NEEDS)
        (outputs.logprobs_K.sum() + 0.1 * outputs.entropy_K.sum()).backward()
        found += [outputs.logprobs_K.detach(), outputs.entropy_K.detach()]
        with torch.no_grad():
            found.append(model.eval()(batch, NEEDS).logprobs_K)
        model.train()
    return found + [p.grad for p in model.parameters() if p.grad is not None]


def assert_equal(model: PolicyModel, compiled: PolicyModel) -> None:
    ours, theirs = results(compiled), results(model)
    assert len(ours) == len(theirs) > 3 * len(PACKS)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("arch", TESTED)
def test_compiled_layers_equal_those_as_they_are(tmp_path: Path, arch: str) -> None:
    save_tiny_model(tmp_path, arch=arch)
    load = [
        load_causal_lm(str(tmp_path), torch.float32, flash_attn=False, layers=x)
        for x in Layers
        if x is not Layers.LIGER
    ]
    before = clock.parts
    assert_equal(*load)
    assert clock.parts > before


def test_layers_and_packs_are_not_compiled_again(tmp_path: Path) -> None:
    """Nine layers and packs of other sizes take the parts that the first layer and pack took."""
    torch.compiler.reset()
    save_tiny_model(tmp_path, num_hidden_layers=9)
    model = load_causal_lm(str(tmp_path), torch.float32, flash_attn=False, layers=Layers.COMPILED)
    before, _, start = clock.parts, clock.take_seconds(), time.perf_counter()
    results(model)
    parts = clock.parts - before
    assert 0 < parts <= 8 < 9
    assert 0 < clock.take_seconds() <= time.perf_counter() - start
    results(model)
    results(load_causal_lm(str(tmp_path), torch.float32, flash_attn=False, layers=Layers.COMPILED))
    assert clock.parts - before == parts
    assert clock.take_seconds() == 0


@pytest.mark.parametrize("lora", [None, LoRA(4, 16, 0.0, ("q_proj", "down_proj"), load_in_4bit=False)])
def test_recomputing_and_adapters_change_nothing(tmp_path: Path, lora: LoRA | None) -> None:
    save_tiny_model(tmp_path)
    models = []
    for layers in (Layers.STANDARD, Layers.COMPILED):
        torch.manual_seed(0)
        model = load_causal_lm(
            str(tmp_path), torch.float32, flash_attn=False, recompute=Recompute(above=10), lora=lora, layers=layers
        )
        models.append(model)
    if lora is not None:
        for model in models:
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    assert_equal(*models)


def test_an_architecture_it_was_not_tested_with_is_refused(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, arch="mixtral")
    with pytest.raises(ModelError, match=r"--torch_compile is tested with gemma, .* and this is a mixtral model"):
        load_causal_lm(str(tmp_path), torch.float32, flash_attn=False, layers=Layers.COMPILED)
