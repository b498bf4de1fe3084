"""Linear layers with reordered weights give the plain ones' results, in a model and in an engine after an update."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.tiny import save_tiny_model, tiny_model
from togi.cpu import layers
from togi.cpu.layers import pack_linears, packable
from togi.rollout.engine import EngineSettings
from togi.rollout.transformers_engine import TransformersCore
from togi.weights.buckets import pack_buckets

TOKENS = tuple(range(20, 60))
TYPES = [torch.float32, torch.bfloat16]
ROUNDING = {torch.float32: 2**-18, torch.bfloat16: 2**-7}


def logits(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        out: Tensor = model(input_ids=torch.tensor([TOKENS])).logits
        return out.float()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("arch", ["llama", "qwen2", "mixtral"])
def test_a_packed_model_gives_the_same_logits(arch: str, dtype: torch.dtype) -> None:
    """Qwen 2 has biases; the experts of Mixtral are no linear layers and stay as they are."""
    model = tiny_model(arch, dtype=dtype, tie_word_embeddings=True)
    plain = logits(model)
    pack_linears(model)
    rounding = ROUNDING[dtype]
    torch.testing.assert_close(logits(model), plain, rtol=rounding, atol=rounding * float(plain.abs().max()))


@pytest.mark.parametrize("dtype", TYPES)
def test_plain_weights_are_let_go_and_a_tied_embedding_stays(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=dtype, tie_word_embeddings=True)
    before = model.get_input_embeddings().weight.clone()
    pack_linears(model)
    linears = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert len(linears) == 2 * 7 + 1
    assert all((layer.weight.numel() == 0) == ("forward" in vars(layer)) == (dtype in packable()) for layer in linears)
    assert torch.equal(model.get_input_embeddings().weight, before)


def test_other_types_and_processors_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_left(layer: nn.Linear) -> bool:
        pack_linears(layer)
        return layer.weight.numel() == 32 and "forward" not in vars(layer)

    assert is_left(nn.Linear(8, 4, dtype=torch.float64))
    assert not is_left(nn.Linear(8, 4))
    monkeypatch.setattr(layers.torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert is_left(nn.Linear(8, 4, dtype=torch.bfloat16)) and not is_left(nn.Linear(8, 4))
    monkeypatch.setattr(layers.torch.backends.mkldnn, "is_available", lambda: False)
    assert is_left(nn.Linear(8, 4))


def test_an_engine_in_bfloat16_scores_as_the_model_does_before_and_after_an_update(tmp_path: Path) -> None:
    folders = [save_tiny_model(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    core = TransformersCore(EngineSettings(str(folders[0]), max_model_len=64))
    found = [core.score(0, TOKENS)]
    core.begin_update()
    state = {name: tensor.bfloat16() for name, tensor in load_file(folders[1] / "model.safetensors").items()}
    for bucket in pack_buckets(state.items(), 20_000):
        core.load(bucket)
    core.finish_update(1)
    found.append(core.score(0, TOKENS))
    for folder, scores in zip(folders, found, strict=True):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        expected = logits(model)[0].log_softmax(-1)[:-1].gather(1, torch.tensor(TOKENS[1:])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(scores), expected, rtol=0.02, atol=0.05)
    assert not torch.allclose(torch.tensor(found[0]), torch.tensor(found[1]), atol=0.5)
