"""Attention: FlashAttention over shared prefixes against dense attention in float64, and its speed beside SDPA's.

Shape letters: T packed tokens, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gpu.tools import Bounds, Figures, Skip, error, extra_gb, group, milliseconds, tables

if TYPE_CHECKING:
    from togi.batch import Segments

ROUNDING = 0.02
"""Bound on the error of outputs and gradients: about five roundings to bfloat16, of the largest value."""
LSE_ERROR = 5e-3
LAYER = (28, 4)
"""Query heads and key/value heads of Qwen2.5-7B; its heads are of 128."""
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def _inputs(device: torch.device, tokens: int, heads: tuple[int, int], size: int) -> list[Tensor]:
    """Queries [T, H, D], keys and values [T, G, D] in bfloat16."""
    torch.manual_seed(0)
    shapes = [(tokens, number, size) for number in (heads[0], heads[1], heads[1])]
    return [torch.randn(shape, device=device).bfloat16().requires_grad_() for shape in shapes]


def _need_flash(inputs: Sequence[Tensor]) -> None:
    from togi.algo.partial_attention import flash_takes

    if not flash_takes(inputs[0], inputs[2]):
        raise Skip(f"FlashAttention does not compute {inputs[0].dtype} on {inputs[0].device.type}")


def _weights(out: Tensor) -> Tensor:
    """The gradient that is sent back."""
    return torch.arange(out.numel(), device=out.device).view_as(out).cos().to(out.dtype)


def _forward_backward(attend: Attend, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The output and the gradients of q, k and v."""
    given = [x.detach().requires_grad_() for x in inputs]
    out = attend(*given)
    out.backward(_weights(out))
    return [out.detach(), *(x.grad for x in given if x.grad is not None)]


def _shapes(small: bool) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...]]:
    """Numbers of heads, and their sizes."""
    return (((4, 2),), (16, 20)) if small else ((LAYER, (32, 8), (8, 8)), (64, 80, 128, 256))


def flash(device: torch.device, small: bool) -> Figures:
    """Outputs and gradients against dense attention in float64, and twice the same bits where that is asked for."""
    from tests.attention_cases import dense_mask
    from tests.packs import make_segments
    from togi.model.attention import attend_to_prefixes

    n = 1 if small else 24  # the longest pieces then span several tiles of the kernel
    shared = tables([(9 * n, [7 * n, 1, 5 * n]), (3 * n, [4 * n, 1]), (1, [1, 2 * n])])
    packs = {
        "plain": make_segments([11 * n, 1, 5 * n, 1], [-1] * 4),
        "shared": make_segments(*shared),
        "tree": make_segments([3 * n, 2 * n, 1, 4 * n, 5 * n, 2 * n, 3 * n, 1, n], [-1, 0, 0, 0, -1, -1, 5, 6, 6]),
    }
    _need_flash(_inputs(device, 2, LAYER, 128))
    bounds, cases = Bounds(), 0
    for (name, table), heads, size, window in product(packs.items(), *_shapes(small), (None, 2, 3 * n)):
        inputs = _inputs(device, sum(table.lengths_S), heads, size)
        seen_TT = dense_mask(table, window).to(device)
        scale = size**-0.5
        exact = _forward_backward(partial(_dense, seen_TM=seen_TT, scale=scale), [x.double() for x in inputs])
        attend = partial(attend_to_prefixes, segments=table, scale=scale, window=window)
        case = f"{name} pack, heads {heads}, D {size}, window {window}"
        cases += 1
        try:
            found, pair = _forward_backward(attend, inputs), _deterministic(attend, inputs)
        except RuntimeError as problem:
            bounds.fail(case, problem)
            continue
        for what, one, other in zip(("out", "dq", "dk", "dv"), found, exact, strict=True):
            bounds.hold(f"{case}: {what}", error(one, other), ROUNDING)
        differing = sum(not torch.equal(one, other) for one, other in zip(*pair, strict=True))
        bounds.hold(f"{case}: tensors that differ when repeated", differing, 0)
    yield "cases", cases
    yield "largest error", bounds.worst
    yield from _joined(device, bounds, 16 * n)
    bounds.check()


def _deterministic(attend: Attend, inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Twice, with deterministic algorithms."""
    torch.use_deterministic_algorithms(True)
    try:
        return _forward_backward(attend, inputs), _forward_backward(attend, inputs)
    finally:
        torch.use_deterministic_algorithms(False)


def _dense(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, seen_TM: Tensor | None, scale: float) -> Tensor:
    """The definition of attention."""
    q_HTD, k_HTD, v_HTD = _heads_first(q_THD, k_TGD, v_TGD)
    scores_HTM = q_HTD @ k_HTD.transpose(1, 2) * scale
    if seen_TM is not None:
        scores_HTM = scores_HTM.masked_fill(~seen_TM, -torch.inf)
    return (scores_HTM.softmax(-1) @ v_HTD).transpose(0, 1).contiguous()


def _heads_first(q_THD: Tensor, *others: Tensor) -> list[Tensor]:
    """[H, T, D], with a key/value head for each query head."""
    repeats = q_THD.shape[1] // others[0].shape[1]
    return [q_THD.transpose(0, 1), *(x.repeat_interleave(repeats, dim=1).transpose(0, 1) for x in others)]


def _joined(device: torch.device, bounds: Bounds, tokens: int) -> Figures:
    """Two parts of the keys, joined by log-sum-exp, and the backward of each part from the joined result."""
    from togi.algo.partial_attention import Pieces, join

    inputs = [x.detach() for x in _inputs(device, tokens, LAYER, 128)]
    scale, heads = 128**-0.5, LAYER[0]
    exact = _forward_backward(partial(_dense, seen_TM=None, scale=scale), [x.double() for x in inputs])
    q_THD, half = inputs[0], tokens // 4
    pieces = [Pieces.equal(1, tokens, keys, False, device) for keys in (half, tokens - half)]
    parts = [[x[:half] for x in inputs[1:]], [x[half:] for x in inputs[1:]]]
    found = [piece.attend(q_THD, *part, scale) for piece, part in zip(pieces, parts, strict=True)]
    (out, lse_HT), (more, more_HT) = found
    yield "shape of the log-sum-exp", "heads, tokens" if lse_HT.shape == (heads, tokens) else str(tuple(lse_HT.shape))
    assert lse_HT.shape == (heads, tokens)
    q_HTD, k_HTD, _ = _heads_first(*(x.double() for x in inputs))
    out_THD, lse_TH = join(out.float(), lse_HT.t(), more.float(), more_HT.t())
    bounds.hold("log-sum-exp", error(lse_TH.t(), (q_HTD @ k_HTD.transpose(1, 2) * scale).logsumexp(-1)), LSE_ERROR)
    bounds.hold("joined output", error(out_THD, exact[0]), ROUNDING)
    whole = (out_THD.bfloat16(), lse_TH.t().contiguous())
    grad = _weights(whole[0])
    grads = [
        piece.backward(grad, (q_THD, part[0], part[1]), *whole, scale)
        for piece, part in zip(pieces, parts, strict=True)
    ]
    together = [grads[0][0].float() + grads[1][0].float(), *(torch.cat([grads[0][i], grads[1][i]]) for i in (1, 2))]
    worst = [error(one, other) for one, other in zip(together, exact[1:], strict=True)]
    for what, value in zip(("dq", "dk", "dv"), worst, strict=True):
        bounds.hold(f"joined {what}", value, ROUNDING)
    yield "largest error of joined gradients", max(worst)


def attention_speed(device: torch.device, small: bool) -> Figures:
    """16k tokens, 8 prompts x 8 responses, one layer of a 7B model: FlashAttention beside SDPA, forward and backward."""
    from tests.packs import make_segments
    from togi.model.attention import segment_attention, varlen_attention

    shapes = group(2, 3, 8, 4) if small else group(8, 8, 512, 192)
    table = make_segments(*tables(shapes))
    inputs = _inputs(device, sum(table.lengths_S), LAYER, 128)
    _need_flash(inputs)
    yield "tokens", len(inputs[0])
    results = list[list[Tensor]]()
    for name, function in (("segments", segment_attention), ("flash", varlen_attention)):
        call = partial(_forward_backward, partial(_in_a_layer, function, table), inputs)
        yield f"{name}: ms", milliseconds(device, call)
        yield f"{name}: GB", extra_gb(device, call)
        yield f"{name}: ran", _kernels(call)
        results.append(call())
    bounds = Bounds()
    for what, one, other in zip(("out", "dq", "dk", "dv"), results[1], results[0], strict=True):
        bounds.hold(f"{what} of flash against segments", error(one, other), 2 * ROUNDING)
    yield "largest difference", bounds.worst
    bounds.check()


def _in_a_layer(function: Callable[..., tuple[Tensor, None]], table: Segments, *inputs: Tensor) -> Tensor:
    """As Transformers calls it: [1, H, T, D] in, [1, T, H, D] out."""
    return function(torch.nn.Identity(), *(x.transpose(0, 1)[None] for x in inputs), None, segments=table)[0]


def _kernels(call: Callable[[], object]) -> str:
    """Which attention operators one call runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    events = [event for event in profile.key_averages() if "attention" in event.key and "::" in event.key]
    return ", ".join(sorted(f"{event.key.removeprefix('aten::')} x{event.count}" for event in events)) or "none"


def ring(device: torch.device, small: bool) -> Figures:
    """One chunk of ring attention, 4,096 tokens with as many before them: FlashAttention beside plain tiles."""
    from togi.algo import partial_attention as parts

    tokens = 16 if small else 4096
    inputs = [x.detach().transpose(0, 1)[None] for x in _inputs(device, tokens, LAYER, 128)]
    _need_flash(inputs)
    scale, bounds = 128**-0.5, Bounds()
    for causal in (True, False):
        visible, results = parts.Visibility(causal), list[tuple[Tensor, ...]]()
        exact = parts.attend_in_tiles(*(x.double() for x in inputs), scale, visible)
        for name, forward, backward in (
            ("flash", parts.attend, parts.attend_backward),
            ("tiles", parts.attend_in_tiles, parts.attend_in_tiles_backward),
        ):
            ahead = partial(forward, *inputs, scale, visible)
            out, lse = ahead()
            back = partial(backward, _weights(out), tuple(inputs), out, lse, scale, visible)
            label = f"{name}, {'its own' if causal else 'earlier'} keys"
            yield f"{label}: ms", milliseconds(device, ahead, 3) + milliseconds(device, back, 3)
            yield f"{label}: error", error(out, exact[0])
            if name == "flash":
                bounds.hold(f"{label}: output", error(out, exact[0]), ROUNDING)
                bounds.hold(f"{label}: log-sum-exp", error(lse, exact[1]), LSE_ERROR)
            results.append(back())
        for what, one, other in zip(("dq", "dk", "dv"), *results, strict=True):
            bounds.hold(f"{what}, causal {causal}", error(one, other), 2 * ROUNDING)
    bounds.check()
