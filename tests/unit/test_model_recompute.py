"""Which layers recompute their activations: as many as the tokens of a pack ask for, and what that keeps."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.kept_memory import kept_bytes
from tests.packs import plain_pack, random_groups
from tests.tiny import save_tiny_model, tiny_model
from togi.batch import Batch
from togi.config.parse import parse
from togi.config.shared import Recompute
from togi.cpu.layers import use_host_layers
from togi.errors import ModelError
from togi.methods.sft import SFT
from togi.model import layers
from togi.model.attention import SEGMENTS
from togi.model.layers import recomputed_layers, use_recompute
from togi.model.loading import ModelSource, load_causal_lm
from togi.model.policy import Needs, PolicyModel

LAYERS = 4


def model_of(how: Recompute | None, dtype: torch.dtype = torch.float32) -> PolicyModel:
    hf = tiny_model("llama", dtype=dtype, num_hidden_layers=LAYERS)
    hf.set_attn_implementation(SEGMENTS)
    use_host_layers(hf)
    if how is not None:
        use_recompute(hf, how)
    return PolicyModel(hf).train()


def pack_of(*lengths: int) -> Batch:
    """Sequences of which the first ten tokens are a prompt."""
    return plain_pack(random_groups(0, [(10, [length - 10]) for length in lengths]))


@pytest.mark.parametrize(
    ("layers", "tokens", "above", "expected"),
    [
        (30, 8192, 0, 30),
        (30, 8192, 4096, 15),
        (30, 8193, 4096, 16),  # 15.002 would keep more than 4,096 tokens do
        (30, 8192, 8191, 1),
        (30, 8192, 8192, 0),
        (30, 100, 8192, 0),
        (30, 0, 8192, 0),
    ],
)
def test_how_many_layers_recompute(layers: int, tokens: int, above: int, expected: int) -> None:
    assert recomputed_layers(layers, tokens, above) == expected


def gradients(model: PolicyModel, batch: Batch) -> dict[str, Tensor]:
    model.zero_grad()
    model(batch, Needs(logprobs=True)).logprobs_K.sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("how", [Recompute(), Recompute(use_reentrant=True), Recompute(above=60), Recompute(above=300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputing_changes_no_gradient(how: Recompute, dtype: torch.dtype) -> None:
    """Of 120 tokens, with the layers' own ways to keep less on a CPU."""
    batch, plain, recomputing = pack_of(40, 50, 30), model_of(None, dtype), model_of(how, dtype)
    expected, got = gradients(plain, batch), gradients(recomputing, batch)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(got[name], gradient), name


def test_only_the_first_layers_run_again() -> None:
    """Of four layers and 60 tokens: three for a pack of 240, two for one of 120, none for one of 60, then three again."""
    model, runs = model_of(Recompute(above=60)), Counter[int]()
    for place, layer in enumerate(model.hf.model.layers):
        layer.mlp.register_forward_pre_hook(lambda module, inputs, place=place: runs.update([place]))
    for lengths, expected in ((80, 80, 80), [2, 2, 2, 1]), ((60, 60), [2, 2, 1, 1]), ((60,), [1, 1, 1, 1]):
        for _ in range(2):
            runs.clear()
            gradients(model, pack_of(*lengths))
            assert [runs[place] for place in range(LAYERS)] == expected


def test_from_the_flags_to_the_layers_of_a_loaded_model(tmp_path: Path) -> None:
    """Two layers and 120 tokens, of which 60 are kept by all: one recomputes."""
    words = ["--pretrain", "m", "--dataset", "d", "--output_key", "a"]
    assert parse(SFT, words, "sft").config.recompute is None
    words += ["--gradient_checkpointing", "--gradient_checkpointing_above", "60"]
    how = parse(SFT, words, "sft").config.recompute
    assert how == Recompute(use_reentrant=False, above=60)
    model = load_causal_lm(ModelSource(str(save_tiny_model(tmp_path)), torch.float32, recompute=how))
    model(pack_of(60, 60), Needs(logprobs=True))
    assert [layer.gradient_checkpointing for layer in model.hf.model.layers] == [True, False]


def test_layers_that_cannot_be_chosen_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a model that brings its own code for them; all of them together recompute as ever."""
    monkeypatch.setattr(layers, "GradientCheckpointingLayer", type("Other", (), {}))
    batch = pack_of(40, 50)
    expected, got = gradients(model_of(None), batch), gradients(model_of(Recompute()), batch)
    assert all(torch.equal(got[name], gradient) for name, gradient in expected.items())
    with pytest.raises(
        ModelError, match="--gradient_checkpointing_above: layers of a llama model recompute all or none"
    ):
        model_of(Recompute(above=60))


def test_a_long_pack_keeps_what_a_short_one_does() -> None:
    """All layers of 200 tokens keep as much as those that are left of 400 and of 800, inputs of the others aside."""
    packs = {tokens: pack_of(*[100] * (tokens // 100)) for tokens in (200, 400, 800)}
    nothing = {tokens: kept_bytes(model_of(Recompute()), batch) for tokens, batch in packs.items()}
    layers = {
        tokens: kept_bytes(model_of(Recompute(above=200)), batch) - nothing[tokens] for tokens, batch in packs.items()
    }
    assert layers[200] > 100_000
    assert layers[400] == pytest.approx(layers[200], rel=0.05)
    assert layers[800] == pytest.approx(layers[200], rel=0.05)
