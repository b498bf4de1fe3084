"""Norms and gated MLPs on a CPU: Transformers' outputs, bit for bit without kernels, and the gradients of its float64 layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from tests.kept_memory import kept_bytes
from tests.packs import plain_pack, random_groups
from tests.tiny import tiny_config, tiny_model
from togi.cpu import attention as host_blocks
from togi.cpu import kernels as host
from togi.cpu import layers as host_layers
from togi.cpu.kernels import compiled
from togi.cpu.layers import gated, rms_norm, use_host_layers
from togi.model.attention import SEGMENTS
from togi.model.policy import PolicyModel

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture(autouse=True, params=["blocks", "kernels"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Several blocks, the last of them not full; or kernels, which are for bfloat16."""
    monkeypatch.setattr(host_blocks, "BLOCK_ELEMENTS", 200)
    monkeypatch.setattr(host, "BLOCK_ROWS", 5)
    if request.param == "blocks":
        monkeypatch.setattr(host_layers, "compiled", lambda: None)
    else:
        assert compiled() is not None
    return str(request.param)


def assert_same(out: Tensor, expected: Tensor, way: str) -> None:
    """The same bits; of bfloat16 by kernels one value in a hundred may be the next one."""
    if way == "blocks" or out.dtype != torch.bfloat16:
        assert torch.equal(out, expected)
    else:
        torch.testing.assert_close(out, expected, rtol=2**-7, atol=0)
        assert (out != expected).float().mean() <= 0.01


def backward(out: Tensor, grad: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(out, leaves, grad))


def assert_near(got: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    tolerance = 1e-5 if dtype is torch.float32 else 2**-7
    for one, other in zip(got, exact, strict=True):
        scale = float(other.abs().max())
        torch.testing.assert_close(one.double() / scale, other / scale, rtol=0, atol=tolerance)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 23, 48), (1, 7, 3, 32)])
def test_a_norm_is_transformers_norm(way: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, weight, grad = (torch.randn(*size).to(dtype) for size in (shape, shape[-1:], shape))
    layer = LlamaRMSNorm(shape[-1], eps=1e-5)
    layer.weight.data = weight
    x.requires_grad_(), weight.requires_grad_()
    out = rms_norm(x, weight, 1e-5)
    assert_same(out, layer(x), way)
    wide, wide_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = wide_weight * wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    assert_near(backward(out, grad, x, weight), backward(exact, grad.double(), wide, wide_weight), dtype)


@DTYPES
def test_a_gate_is_transformers_gate(way: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate, up, grad = (torch.randn(1, 23, 48).to(dtype) for _ in range(3))
    gate.requires_grad_(), up.requires_grad_()
    out = gated(gate, up)
    assert_same(out, nn.functional.silu(gate) * up, way)
    wide, wide_up = gate.detach().double().requires_grad_(), up.detach().double().requires_grad_()
    exact = nn.functional.silu(wide) * wide_up
    assert_near(backward(out, grad, gate, up), backward(exact, grad.double(), wide, wide_up), dtype)


def test_frozen_weights_and_inputs_get_no_gradient() -> None:
    x, weight = torch.randn(5, 8), torch.randn(8, requires_grad=True)
    rms_norm(x, weight, 1e-6).sum().backward()
    assert weight.grad is not None and x.grad is None
    y = torch.randn(5, 8, requires_grad=True)
    rms_norm(y, weight.detach(), 1e-6).sum().backward()
    assert y.grad is not None


@pytest.mark.parametrize("arch", ["llama", "qwen3", "mistral", "qwen2"])
def test_a_model_keeps_its_outputs_and_gradients(arch: str) -> None:
    tokens = torch.arange(37)[None] % 256

    def run(use: bool) -> tuple[Tensor, dict[str, Tensor]]:
        model = tiny_model(arch)
        if use:
            use_host_layers(model)
        logits = model(input_ids=tokens).logits
        logits.square().mean().backward()
        return logits.detach(), {name: p.grad for name, p in model.named_parameters()}

    (plain, gradients), (logits, ours) = run(False), run(True)
    assert torch.equal(logits, plain)
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_which_layers_are_given_another_forward() -> None:
    """Norms, MLPs and attention; none where the activation is another, whose class is another, or that computes in float64."""

    def changed(model: Any) -> int:
        use_host_layers(model)
        return sum("forward" in vars(layer) for layer in model.modules())

    assert changed(tiny_model("llama")) == 2 * 4 + 1
    assert changed(tiny_model("qwen3")) == 2 * 6 + 1
    assert changed(tiny_model("llama", hidden_act="gelu")) == 2 * 3 + 1
    assert changed(tiny_model("gemma")) == 0
    assert tiny_config("llama").hidden_act == "silu"
    norm, double = Qwen3RMSNorm(8), torch.randn(3, 8, dtype=torch.float64)
    expected = norm(double)
    norm.forward = host_layers.MethodType(host_layers._norm, norm)
    assert torch.equal(norm(double), expected)


def test_the_mlp_runs_its_own_projections() -> None:
    """So that adapters on them are seen."""
    mlp, x = LlamaMLP(tiny_config("llama")), torch.randn(1, 5, 64)
    expected = mlp(x)
    mlp.forward = host_layers.MethodType(host_layers._gated_mlp, mlp)
    assert torch.equal(mlp(x), expected)
    mlp.up_proj.register_forward_hook(lambda module, inputs, output: 2 * output)
    torch.testing.assert_close(mlp(x), 2 * expected)


def kept_a_token(layers: int) -> float:
    """What the forward of a model in bfloat16 keeps for its backward, parameters aside, per token."""
    hf = tiny_model("llama", dtype=torch.bfloat16, num_hidden_layers=layers)
    hf.set_attn_implementation(SEGMENTS)
    use_host_layers(hf)
    model, batch = PolicyModel(hf).train(), plain_pack(random_groups(0, [(40, [60]), (30, [100]), (50, [120])]))
    return kept_bytes(model, batch) / batch.num_tokens


def test_what_a_layer_keeps_for_its_backward() -> None:
    """In bfloat16 inputs of two norms (64 wide), queries and attention (64), keys and values (32), gate and up (96); in float32 a
    scale of each norm. Transformers: 2,600.
    """
    per_layer = (kept_a_token(4) - kept_a_token(2)) / 2
    assert per_layer == pytest.approx(2 * (2 * 64 + 2 * 64 + 2 * 32 + 2 * 96) + 4 * 2)


def test_what_was_not_kept_is_made_in_each_backward() -> None:
    """Of two backwards through the same graph, the second adds the same again."""
    model = tiny_model("llama")
    use_host_layers(model)
    loss = model(input_ids=torch.arange(20)[None]).logits.square().mean()
    loss.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * once[name], msg=name)
