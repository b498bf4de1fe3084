"""What an objective may ask of a model, and what one forward gives back.

Shape letters: K tokens in the loss (ascending packed index, ``Batch.targets_K``), N sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Needs:
    """What the forward must compute. Nothing that is not asked for is computed."""

    logprobs: bool = False
    entropy: bool = False
    values: bool = False
    scores: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Outputs:
    """Results of one forward over a ``Batch``, all float32 (float64 from a float64 model).

    ``logprobs_K[k]``: log-probability of token ``targets_K[k]`` given its own sequence before it, of logits / temperature.
    ``entropy_K[k]``: entropy of that distribution in nats (differentiable). ``values_K[k]``: the value head at the state in
    which that token is chosen. ``scores_N``: the scalar head at each sequence's last token. A field that was not asked for
    is an empty tensor.
    """

    logprobs_K: Tensor
    entropy_K: Tensor
    values_K: Tensor
    scores_N: Tensor
