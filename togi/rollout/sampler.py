"""Choosing the next token: temperature, nucleus, forbidden stops, and the log-prob of what was really sampled from.

Shape letters: N sequences, V vocabulary. Pure functions of tensors; only the Transformers engine needs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """How to choose one sequence's next token. ``forbidden`` ids get no probability; ``temperature`` 0 is greedy.

    ``generator`` is on the CPU whatever the device, one number a token.
    """

    temperature: float
    top_p: float
    forbidden: tuple[int, ...]
    generator: torch.Generator


def choose(logits_NV: Tensor, choices: Sequence[Choice]) -> tuple[Tensor, Tensor]:
    """The next tokens (int64, N) and their log-probs (float32, N, nats).

    Log-probs are of the distribution sampled from: after the temperature, renormalised over the nucleus and without
    the forbidden ids. A greedy choice reports the log-prob at temperature 1.
    """
    logprobs_NV = distribution(logits_NV, choices)
    tokens_N = logprobs_NV.argmax(dim=-1)
    drawn = [row for row, choice in enumerate(choices) if choice.temperature > 0]
    if drawn:
        uniform_n = torch.cat([torch.rand(1, generator=choices[row].generator, dtype=torch.float64) for row in drawn])
        tokens_N[drawn] = invert_cdf(logprobs_NV[drawn], uniform_n.to(logprobs_NV.device))
    return tokens_N, logprobs_NV.gather(1, tokens_N[:, None])[:, 0]


def invert_cdf(logprobs_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """The first id whose cumulative probability exceeds a uniform number in [0, 1): a draw, never of an impossible id.

    In float64, so that the tail of a large vocabulary keeps its probability.
    """
    cdf_NV = logprobs_NV.exp().cumsum(dim=-1, dtype=torch.float64)
    total_N = cdf_NV[:, -1]
    wanted_N = torch.minimum(uniform_N * total_N, torch.nextafter(total_N, torch.zeros_like(total_N)))
    return torch.searchsorted(cdf_NV, wanted_N[:, None], right=True)[:, 0]


def distribution(logits_NV: Tensor, choices: Sequence[Choice]) -> Tensor:
    """Log-probs (float32, N x V) of the distributions that ``choose`` samples from; what cannot be sampled is -inf."""
    logits_NV = logits_NV.to(torch.float32, copy=True)
    for row, choice in enumerate(choices):
        if choice.forbidden:
            logits_NV[row, list(choice.forbidden)] = -torch.inf
    temperatures = [choice.temperature if choice.temperature > 0 else 1.0 for choice in choices]
    if any(temperature != 1.0 for temperature in temperatures):
        logits_NV = logits_NV / logits_NV.new_tensor(temperatures)[:, None]
    cut = [row for row, choice in enumerate(choices) if choice.top_p < 1.0 and choice.temperature > 0]
    if cut:
        top_p_n = logits_NV.new_tensor([choices[row].top_p for row in cut])
        logits_NV[cut] = nucleus(logits_NV[cut], top_p_n)
    return logits_NV.log_softmax(dim=-1)


def nucleus(logits_NV: Tensor, top_p_N: Tensor) -> Tensor:
    """Keep the fewest most likely ids whose probabilities add up to at least ``top_p``; the others become -inf.

    Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020, section 3.1.
    """
    sorted_NV, order_NV = logits_NV.sort(dim=-1, descending=True)
    probs_NV = sorted_NV.softmax(dim=-1)
    before_NV = probs_NV.cumsum(dim=-1) - probs_NV
    dropped_NV = torch.zeros_like(order_NV, dtype=torch.bool).scatter(1, order_NV, before_NV >= top_p_N[:, None])
    dropped_NV.scatter_(1, order_NV[:, :1], False)
    return logits_NV.masked_fill(dropped_NV, -torch.inf)
