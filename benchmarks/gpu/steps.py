"""The fused head, and a training step of a model of 1.5 billion parameters: time, memory, share of the GPU's rate."""

from __future__ import annotations

import collections
import math
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

from gpu.tools import Bounds, Figures, error, extra_gb, finish, group, milliseconds, need_cuda, need_package

if TYPE_CHECKING:
    from togi.learn.learner import Learner

MIB = 2**20
LOGIT_ERROR = 0.06
"""Bound on log-probs and entropies in nats: logits of up to 5 are rounded to bfloat16 twice."""
GRADIENT_ERROR = 0.03


def head(device: torch.device, small: bool) -> Figures:
    """Log-probs, entropies and gradients against float64; time and memory by the size of a chunk."""
    from togi.model.heads import Head, token_logprobs

    vocabulary, width, exact_tokens, tokens = (512, 64, 8, 16) if small else (151_936, 3584, 128, 8192)
    torch.manual_seed(0)
    weight_VH = torch.randn(vocabulary, width, device=device).mul_(width**-0.5).bfloat16()
    hidden_KH = torch.randn(tokens, width, device=device).bfloat16()
    targets_K = torch.randint(vocabulary, (tokens,), device=device)

    def fused(rows: int, **given: int) -> list[Tensor]:
        hidden, weight = hidden_KH[:rows].clone().requires_grad_(), weight_VH.detach().requires_grad_()
        logprobs_K, entropy_K = token_logprobs(hidden, Head(weight), targets_K[:rows], entropy=True, **given)
        (logprobs_K.sum() + entropy_K.sum()).backward()
        assert hidden.grad is not None and weight.grad is not None
        return [logprobs_K, entropy_K, hidden.grad, weight.grad]

    bounds, found = Bounds(), fused(exact_tokens)
    for name, one, other in zip(
        ("log-probs", "entropy", "d hidden", "d weight"),
        found,
        _exact_head(hidden_KH[:exact_tokens], weight_VH, targets_K[:exact_tokens]),
        strict=True,
    ):
        nats = name in ("log-probs", "entropy")
        value = float((one.detach() - other).abs().max()) if nats else error(one, other)
        yield f"error of {name}", value
        bounds.hold(name, value, LOGIT_ERROR if nats else GRADIENT_ERROR)
    del found
    for mib in (32, 128, 512, 1024):
        call = partial(fused, tokens, chunk_bytes=mib * MIB)
        yield f"{mib} MiB: ms", milliseconds(device, call, 2)
        yield f"{mib} MiB: GB", extra_gb(device, call)
    bounds.check()


def _exact_head(hidden_KH: Tensor, weight_VH: Tensor, targets_K: Tensor) -> list[Tensor]:
    hidden, weight = (x.double().requires_grad_() for x in (hidden_KH, weight_VH))
    logp_KV = (hidden @ weight.T).log_softmax(-1)
    logprobs_K = logp_KV.gather(1, targets_K[:, None])[:, 0]
    entropy_K = -(logp_KV.exp() * logp_KV).sum(-1)
    (logprobs_K.sum() + entropy_K.sum()).backward()
    assert hidden.grad is not None and weight.grad is not None
    return [logprobs_K.detach(), entropy_K.detach(), hidden.grad, weight.grad]


def step(device: torch.device, small: bool) -> Figures:
    """SDPA a segment, and FlashAttention with and without recomputation; host syncs of a step."""
    yield from _rate(device, small)
    yield from _variant(device, small, "segments", recompute=True)
    yield from _variant(device, small, "flash, recomputed", flash=True, recompute=True)
    yield from _variant(device, small, "flash", flash=True, syncs=True)


def step_liger(device: torch.device, small: bool) -> Figures:
    """FlashAttention and Liger's kernels."""
    need_cuda(device)
    need_package("liger_kernel")
    from togi.model.layers import apply_liger

    yield from _variant(device, small, "flash + liger", flash=True, change=apply_liger)


def step_compiled(device: torch.device, small: bool) -> Figures:
    """FlashAttention and compiled layers."""
    need_cuda(device)
    from togi.model.layers import check_compiled, clock, compile_layers

    check_compiled("qwen2")
    yield from _variant(device, small, "flash + compiled", flash=True, change=compile_layers)
    yield "seconds of compiling", clock.take_seconds()


def _config(small: bool) -> Qwen2Config:
    """Qwen2.5-1.5B's, or a toy's."""
    sizes = (
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}
        if small
        else {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "vocab_size": 151_936}
    )
    heads = {"num_attention_heads": 4 if small else 12, "num_key_value_heads": 2}
    return Qwen2Config(**sizes, **heads, tie_word_embeddings=True, max_position_embeddings=32_768)


def _rate(device: torch.device, small: bool) -> Figures:
    """What the device reaches in products of large bfloat16 matrices: the measure of the others."""
    size = 128 if small else 8192
    one, other = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    yield "product TFLOP/s", 2 * size**3 / (1e9 * milliseconds(device, lambda: one @ other))


def _variant(
    device: torch.device,
    small: bool,
    name: str,
    *,
    flash: bool = False,
    recompute: bool = False,
    syncs: bool = False,
    change: Callable[..., None] | None = None,
) -> Figures:
    """Steps of SFT on one pack of 16k tokens: milliseconds, TFLOP/s of the model's own operations, peak memory."""
    from tests.packs import random_groups, shared_pack

    shapes = group(2, 3, 8, 4) if small else group(8, 8, 512, 192)
    batch = shared_pack(random_groups(0, shapes, vocab=250))
    config = _config(small)
    try:
        learner = _learner(device, config, flash=flash, recompute=recompute, change=change)
        start = time.perf_counter()
        report = learner.update([batch])
        finish(device)
        yield f"{name}: first step s", time.perf_counter() - start
        assert math.isfinite(report.grad_norm), f"{name}: the gradient norm is {report.grad_norm}"
        yield f"{name}: loss", report.metrics["loss"]
        again = partial(learner.update, [batch])
        taken = milliseconds(device, again, 3)
        yield f"{name}: ms", taken
        yield f"{name}: TFLOP/s", _operations(config, shapes) / (1e9 * taken)
        yield f"{name}: GB beside weights", extra_gb(device, again)
        if syncs and device.type == "cuda":
            yield from _syncs(again, name)
    except torch.cuda.OutOfMemoryError:
        yield f"{name}: memory", "not enough"
    finally:
        learner = again = None  # its memory is for the next variant
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _learner(
    device: torch.device, config: Qwen2Config, *, flash: bool, recompute: bool, change: Callable[..., None] | None
) -> Learner:
    from togi.config.choices import Scheduler
    from togi.config.shared import Recompute
    from togi.learn.learner import Learner
    from togi.learn.objective import SFTObjective
    from togi.learn.schedule import Schedule
    from togi.methods.sft import SFT
    from togi.model.attention import SEGMENTS, VARLEN
    from togi.model.layers import use_recompute
    from togi.model.policy import PolicyModel
    from togi.parallel import trainable
    from togi.parallel.backend import BackendOptions
    from togi.parallel.process import World

    torch.manual_seed(0)
    with device:
        hf = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    hf.set_attn_implementation(VARLEN if flash else SEGMENTS)
    if change is not None:
        change(hf)
    if recompute:
        use_recompute(hf, Recompute())
    backend = trainable(PolicyModel(hf).train(), World.solo(device), BackendOptions(bf16=True))
    schedule = Schedule(SFT(lr_scheduler=Scheduler.CONSTANT, lr_warmup_ratio=0.0), 1e-5, 100)
    return Learner(backend, SFTObjective(), schedule, 1.0)


def _operations(config: Qwen2Config, shapes: list[tuple[int, list[int]]]) -> float:
    """Of forward and backward: three times two a weight and token, and attention of each token to what it sees."""
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    keys = config.num_key_value_heads * width // config.num_attention_heads
    a_layer = 2 * width**2 + 2 * width * keys + 3 * width * inner
    tokens = sum(prompt + sum(responses) for prompt, responses in shapes)
    chosen = sum(sum(responses) for _, responses in shapes)
    seen = sum(prompt**2 / 2 + sum(r * prompt + r**2 / 2 for r in responses) for prompt, responses in shapes)
    products = a_layer * layers * tokens + config.vocab_size * width * chosen
    return 6 * products + 3 * 4 * layers * width * seen


def _syncs(call: Callable[[], object], name: str) -> Figures:
    """How often the host waits for the GPU in one call, and where most often."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = collections.Counter(
        f"{Path(warning.filename).name}:{warning.lineno}" for warning in caught if "synchroniz" in str(warning.message)
    )
    yield f"{name}: host syncs", sum(places.values())
    yield f"{name}: syncs at", ", ".join(f"{place} x{count}" for place, count in places.most_common(6)) or "none"
