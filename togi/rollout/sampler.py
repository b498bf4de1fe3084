"""Sample the next token: repetition penalty, temperature, nucleus, forbidden stops, and the log-prob of the sampled token.

Shape letters: N sequences, V vocabulary, B blocks of W ids, P ids seen before. Pure functions of tensors, for the Transformers
engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from togi.errors import RunError

BLOCK = 256


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """How to sample one sequence's next token. ``forbidden`` ids get no probability; ``temperature`` 0 is greedy.

    ``generator`` is on the CPU for any device, and gives one number a token. ``repetition_penalty`` applies to the ``seen`` ids.
    """

    temperature: float
    top_p: float
    forbidden: tuple[int, ...]
    generator: torch.Generator
    repetition_penalty: float = 1.0
    seen: frozenset[int] = frozenset()


def choose(logits_NV: Tensor, choices: Sequence[Choice]) -> tuple[Tensor, Tensor]:
    """The next tokens (int64, [N]) and their log-probs (float32, [N], nats).

    Log-probs are those of the sampled distribution: after the temperature, renormalised over the nucleus and without
    the forbidden ids. A greedy choice reports the log-prob at temperature 1.
    """
    logprobs_NV = distribution(logits_NV, choices)
    drawn = [row for row, choice in enumerate(choices) if choice.temperature > 0]
    greedy = [row for row, choice in enumerate(choices) if choice.temperature <= 0]
    tokens_N = torch.empty(len(choices), dtype=torch.int64, device=logits_NV.device)
    if greedy:
        tokens_N[greedy] = logprobs_NV[greedy].argmax(dim=-1)
    if drawn:
        # each sequence draws from its own generator, so its tokens do not depend on the rest of the batch
        uniform_n = torch.cat([torch.rand(1, generator=choices[row].generator, dtype=torch.float64) for row in drawn])
        # logprobs_NV is still needed: overwrite only a copy of it
        chances_NV = logprobs_NV[drawn].exp_() if greedy else logprobs_NV.exp()
        tokens_N[drawn] = invert_cdf(chances_NV, uniform_n.to(logits_NV.device))
    return tokens_N, logprobs_NV.gather(1, tokens_N[:, None])[:, 0]


def invert_cdf(probs_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """Sample the first id whose cumulative probability exceeds a uniform number in [0, 1). Never an id of probability 0.

    It finds the block of ids first, then the id in the block. So there is one sum over the vocabulary, and float64, which keeps
    the probability of a long tail, is needed for a small part only. Raises RunError if probabilities are not finite.
    """
    blocks_NBW = pad(probs_NV, (0, -probs_NV.shape[1] % BLOCK)).view(len(probs_NV), -1, BLOCK)
    cdf_NB = blocks_NBW.sum(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    if not bool(cdf_NB[:, -1].isfinite().all()):
        raise RunError(
            "The model gives tokens probabilities that are not finite: its weights hold NaN or infinity. Look at the last "
            "gradient norms, lower the learning rate, and go on from an earlier checkpoint."
        )
    wanted_N = uniform_N * cdf_NB[:, -1]
    block_N = _first_above(cdf_NB, wanted_N)
    before_N = pad(cdf_NB, (1, 0)).gather(1, block_N[:, None])[:, 0]
    inside_NW = blocks_NBW[torch.arange(len(block_N), device=block_N.device), block_N].cumsum(
        dim=-1, dtype=torch.float64
    )
    return block_N * BLOCK + _first_above(inside_NW, wanted_N - before_N)


def _first_above(cdf_NX: Tensor, wanted_N: Tensor) -> Tensor:
    """The index of the first entry of each row above a number. The number is clamped below the row's end, against rounding."""
    below_N = torch.minimum(wanted_N, torch.nextafter(cdf_NX[:, -1], torch.zeros_like(wanted_N)))
    return torch.searchsorted(cdf_NX, below_N[:, None], right=True)[:, 0]


def distribution(logits_NV: Tensor, choices: Sequence[Choice]) -> Tensor:
    """Log-probs (float32, [N, V]) of the distributions that ``choose`` samples from. -inf for ids that cannot be sampled."""
    logits_NV = logits_NV.to(torch.float32, copy=True)
    # penalty and forbidden ids first: temperature and nucleus apply to the logits that these leave
    for row, choice in enumerate(choices):
        if choice.repetition_penalty != 1.0:
            seen_P = torch.tensor(sorted(choice.seen), device=logits_NV.device)
            repeated_P = logits_NV[row, seen_P]
            penalty = choice.repetition_penalty
            logits_NV[row, seen_P] = torch.where(repeated_P > 0, repeated_P / penalty, repeated_P * penalty)
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
    """Keep the fewest most likely ids whose probabilities add up to at least ``top_p``. The others become -inf.

    Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020, section 3.1.
    """
    sorted_NV, order_NV = logits_NV.sort(dim=-1, descending=True)
    probs_NV = sorted_NV.softmax(dim=-1)
    before_NV = probs_NV.cumsum(dim=-1) - probs_NV
    dropped_NV = torch.zeros_like(order_NV, dtype=torch.bool).scatter(1, order_NV, before_NV >= top_p_N[:, None])
    # the most likely id always stays
    dropped_NV.scatter_(1, order_NV[:, :1], False)
    return logits_NV.masked_fill(dropped_NV, -torch.inf)
