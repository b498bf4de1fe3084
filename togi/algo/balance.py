"""The load-balancing loss of a mixture of experts, for each sequence on its own.

A sequence has n tokens, each of which passes M layers and takes k of E experts in each. f_e is the number of choices of expert e
over all M n routings, divided by M n. P_e is the mean probability that the router gives expert e. The loss is E sum_e f_e P_e,
which is k if all experts are used alike. It is the loss of Switch Transformer (Fedus et al. 2021, arXiv 2101.03961, equations 4 to
6), as Transformers computes it for one sequence. It is taken sequence by sequence, as in DeepSeek-V3 (arXiv 2412.19437, equations
17 to 20), so that the other sequences of a batch cannot change it.

Shape letters: T tokens, E experts, S segments, N sequences.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def routing_sums(logits_TE: Sequence[Tensor], top_k: int, segments_T: Tensor, segments: int) -> Tensor:
    """Sums over the tokens and layers of each segment, shape [2, S, E]: the router's probabilities, and choices (no gradient).

    ``logits_TE``: the router logits of each layer. ``segments_T``: the segment of each token, below ``segments``. float32, or
    float64 from a float64 model.
    """
    dtype = torch.promote_types(logits_TE[0].dtype, torch.float32)
    probabilities_TE = torch.zeros_like(logits_TE[0], dtype=dtype)
    choices_TE = torch.zeros_like(probabilities_TE)
    for layer_TE in logits_TE:
        shares_TE = layer_TE.to(dtype).softmax(-1)
        probabilities_TE = probabilities_TE + shares_TE
        choices_TE.scatter_add_(1, shares_TE.detach().topk(top_k, dim=-1).indices, torch.ones_like(choices_TE))
    both_T2E = torch.stack([probabilities_TE, choices_TE], dim=1)
    empty_S2E = both_T2E.new_zeros(segments, *both_T2E.shape[1:])
    return empty_S2E.index_add(0, segments_T, both_T2E).transpose(0, 1)


def balance_loss(sums_2SE: Tensor, top_k: int, chains_NS: Tensor) -> Tensor:
    """The loss of each sequence, shape [N], from ``routing_sums`` over all tokens, with a gradient through the probabilities.

    ``chains_NS``: 1 where a segment is part of a sequence (a shared prompt is part of several), else 0.
    """
    probabilities_NE, choices_NE = chains_NS.to(sums_2SE.dtype) @ sums_2SE
    routings_N = choices_NE.sum(1) / top_k
    # f_e and P_e are sums here: the square divides both by M n
    losses_N: Tensor = sums_2SE.shape[2] * (choices_NE * probabilities_NE).sum(1) / routings_N.square()
    return losses_N
