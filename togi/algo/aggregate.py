"""The aggregation of per-token terms into one number: the only reduction of token losses in the project.

    loss = sum over the step of (token_weights * terms) / sum over the step of count

Both sums run over all micro-batches and all ranks before the one division, so neither packing, accumulation nor world
size can change a gradient. A sequence must not be split between micro-batches.
Shape letters: K tokens in the loss, N sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from togi.config.choices import Aggregation


def token_weights(
    aggregation: Aggregation,
    sequences_K: Tensor,
    num_sequences: int,
    constant: float,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight of each token's term. Shape [K], on the device of ``sequences_K``.

    token_mean and constant: 1. sequence_mean: 1 / number of tokens in the loss of the token's own sequence.
    ``constant`` is unused; it is a parameter so that ``token_weights`` and ``count`` are called alike.
    """
    match aggregation:
        case Aggregation.TOKEN_MEAN | Aggregation.CONSTANT:
            return torch.ones(sequences_K.shape, dtype=dtype, device=sequences_K.device)
        case Aggregation.SEQUENCE_MEAN:
            lengths_N = torch.bincount(sequences_K, minlength=num_sequences)
            return lengths_N[sequences_K].to(dtype).reciprocal()


def count(aggregation: Aggregation, sequences_K: Tensor, num_sequences: int, constant: float) -> float:
    """This part's share of the denominator; the shares of all parts are added.

    token_mean: tokens. sequence_mean: sequences with at least one token in the loss. constant (Dr. GRPO,
    arXiv 2503.20783): all sequences times ``constant``, the generation limit in tokens, so that the length of an answer cannot
    change it.
    """
    match aggregation:
        case Aggregation.TOKEN_MEAN:
            return float(sequences_K.numel())
        case Aggregation.SEQUENCE_MEAN:
            return float((torch.bincount(sequences_K, minlength=num_sequences) > 0).sum())
        case Aggregation.CONSTANT:
            assert constant > 0, "the constant divisor must be positive"
            return float(num_sequences * constant)


def mean_of_own_sequence(values_K: Tensor, sequences_K: Tensor, num_sequences: int) -> Tensor:
    """For each token the mean over the tokens in the loss of its own sequence. Shape [K], differentiable."""
    sums_N = values_K.new_zeros(num_sequences).index_add(0, sequences_K, values_K)
    lengths_N = torch.bincount(sequences_K, minlength=num_sequences)
    # gathered before the division: a sequence without tokens would divide by 0
    return sums_N[sequences_K] / lengths_N[sequences_K]
