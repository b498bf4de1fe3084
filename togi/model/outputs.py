"""``Needs``: what an objective requests from a forward. ``Outputs``: what the forward returns.

Shape letters: K tokens in the loss (ascending packed index, ``Batch.targets_K``), N sequences, H hidden size, R the tokens
of ``Needs.next_logits``, M layers with experts, C experts chosen for a token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

LABELS = "labels"
"""The stream that holds, at each token in the loss, the id of the token that should follow (``Needs.label_logprobs``)."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What the forward must compute. Outputs that are not requested are not computed.

    ``label_logprobs`` and ``next_logits`` (ids of a few tokens) are predictions at a token in the loss about the token that
    follows it; all others are about the token itself. ``states`` requests hidden states in place of log-probs. ``balance`` and
    ``routes`` are for a mixture of experts only, and can be added to any of the others.
    """

    logprobs: bool = False
    entropy: bool = False
    values: bool = False
    scores: bool = False
    label_logprobs: bool = False
    next_logits: tuple[int, ...] = ()
    states: bool = False
    balance: bool = False
    routes: bool = False


def _empty() -> Tensor:
    return torch.empty(0)


@dataclass(frozen=True, slots=True, eq=False)
class Outputs:
    """Results of one forward over a ``Batch``, all float32 (float64 from a float64 model).

    ``logprobs_K[k]``: log-probability of token ``targets_K[k]`` given its own sequence before it, of logits / temperature.
    ``entropy_K[k]``: entropy of that distribution in nats (differentiable). ``values_K[k]``: the value of the state in which that
    token is chosen. ``scores_N``: the scalar head at each sequence's last token.
    ``label_logprobs_K[k]``: log-probability of the label as the token after ``targets_K[k]``; ``label_hits_K`` (bool):
    whether the label is the likeliest token there. ``next_logits_KR``: the logits of the tokens of ``Needs.next_logits`` there.
    ``divergence_K[k]``: divergence of the distribution of token ``targets_K[k]`` from a teacher's, in nats.
    ``balance_N``: the load-balancing loss of each sequence (``togi.algo.balance``).
    ``routes_KMC`` (int64): the experts to which token ``targets_K[k]`` itself is routed, in each layer.
    ``states_kH``: the hidden states from which ``logprobs_K`` is computed, in the model's own dtype; in a ring only those of this
    rank (``ring_layout``).
    A field that was not requested is an empty tensor.
    """

    logprobs_K: Tensor = field(default_factory=_empty)
    entropy_K: Tensor = field(default_factory=_empty)
    values_K: Tensor = field(default_factory=_empty)
    scores_N: Tensor = field(default_factory=_empty)
    label_logprobs_K: Tensor = field(default_factory=_empty)
    label_hits_K: Tensor = field(default_factory=_empty)
    next_logits_KR: Tensor = field(default_factory=_empty)
    divergence_K: Tensor = field(default_factory=_empty)
    states_kH: Tensor = field(default_factory=_empty)
    balance_N: Tensor = field(default_factory=_empty)
    routes_KMC: Tensor = field(default_factory=_empty)
