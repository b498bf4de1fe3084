"""``--torch_compile``: Inductor's layers = the layers as they are, in outputs and gradients, for packs of any size."""

import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.offline_world import flags, make_world
from tests.packs import random_groups, shared_pack
from tests.tiny import save_tiny_model
from togi.config.architectures import COMPILABLE
from togi.config.choices import Layers
from togi.config.parse import parse
from togi.config.shared import LoRA, Recompute
from togi.errors import ConfigError, ModelError
from togi.methods.kd import KD
from togi.model.adapters import without_adapter
from togi.model.layers import clock
from togi.model.loading import ModelSource, load_causal_lm
from togi.model.policy import Needs, PolicyModel
from togi.run.preflight import check_offline


@pytest.fixture(autouse=True)
def layers_must_be_compiled() -> Iterator[None]:
    """Beyond the limit of ways to call them they would run as they are, and be equal."""
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


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


def logprobs_without_adapter(model: PolicyModel) -> Tensor:
    with without_adapter(model), torch.no_grad():
        return model.eval()(PACKS[0], NEEDS).logprobs_K


def assert_equal(model: PolicyModel, compiled: PolicyModel) -> None:
    ours, theirs = results(compiled), results(model)
    assert len(ours) == len(theirs) > 3 * len(PACKS)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


# compiling takes many seconds for each
EVERY_TIME = ("llama", "gemma3_text")


@pytest.mark.parametrize(
    "arch", [pytest.param(arch, marks=() if arch in EVERY_TIME else pytest.mark.large) for arch in COMPILABLE]
)
def test_compiled_layers_equal_those_as_they_are(tmp_path: Path, arch: str) -> None:
    save_tiny_model(tmp_path, arch=arch)
    load = [
        load_causal_lm(ModelSource(str(tmp_path), torch.float32, layers=x)) for x in Layers if x is not Layers.LIGER
    ]
    before = clock.parts
    assert_equal(*load)
    assert clock.parts > before


def test_layers_and_packs_are_not_compiled_again(tmp_path: Path) -> None:
    """Nine layers and packs of other sizes take the parts that the first layer and pack took."""
    torch.compiler.reset()
    save_tiny_model(tmp_path, num_hidden_layers=9)
    model = load_causal_lm(ModelSource(str(tmp_path), torch.float32, layers=Layers.COMPILED))
    before, _, start = clock.parts, clock.take_seconds(), time.perf_counter()
    results(model)
    parts = clock.parts - before
    assert 0 < parts <= 8 < 9
    assert 0 < clock.take_seconds() <= time.perf_counter() - start
    results(model)
    results(load_causal_lm(ModelSource(str(tmp_path), torch.float32, layers=Layers.COMPILED)))
    assert clock.parts - before == parts
    assert clock.take_seconds() == 0


ADAPTERS = LoRA(4, 16, 0.0, ("q_proj", "down_proj"), load_in_4bit=False)


@pytest.mark.parametrize("lora", [None, pytest.param(ADAPTERS, marks=pytest.mark.large)])
def test_recomputing_and_adapters_change_nothing(tmp_path: Path, lora: LoRA | None) -> None:
    save_tiny_model(tmp_path)
    models = []
    for layers in (Layers.STANDARD, Layers.COMPILED):
        torch.manual_seed(0)
        model = load_causal_lm(
            ModelSource(str(tmp_path), torch.float32, recompute=Recompute(above=10), lora=lora, layers=layers)
        )
        models.append(model)
    before = clock.parts
    if lora is None:
        assert_equal(*models)
    else:
        for model in models:
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
        assert_equal(*models)
        bases = [logprobs_without_adapter(model) for model in models]
        torch.testing.assert_close(*bases, rtol=1e-5, atol=1e-5)
        assert_equal(*models)
        with torch.no_grad():
            assert (models[1](PACKS[0], NEEDS).logprobs_K - bases[1]).abs().max() > 0.1
    assert clock.parts > before


@pytest.mark.parametrize(
    ("lacks", "words"), [("CXX", "there is no .*/none: install it"), ("include", "install python3-dev")]
)
def test_what_compiling_needs_is_looked_for_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacks: str, words: str
) -> None:
    save_tiny_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    if lacks == "CXX":
        monkeypatch.setenv("CXX", str(tmp_path / "none"))
    else:
        monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ConfigError, match=words):
        load_causal_lm(ModelSource(str(tmp_path), torch.float32, layers=Layers.COMPILED))


def test_an_architecture_it_was_not_tested_with_is_refused(tmp_path: Path) -> None:
    """In any role, by config.json; of a hub name when the model is loaded."""
    make_world(tmp_path)
    save_tiny_model(tmp_path / "mixtral", arch="mixtral")
    argv = flags(tmp_path, "kd", tmp_path / "run", "--torch_compile", "--teacher_model", str(tmp_path / "mixtral"))
    with pytest.raises(ConfigError, match=r"--torch_compile is tested .* --teacher_model \S+ is a mixtral model"):
        check_offline(parse(KD, argv, "kd"))
    with pytest.raises(ModelError, match=r"--torch_compile is tested with gemma, .* and this is a mixtral model"):
        load_causal_lm(ModelSource(str(tmp_path / "mixtral"), torch.float32, layers=Layers.COMPILED))
