"""The loss of ORPO. Shape letter: P pairs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from togi.algo.preference import log_odds
from togi.methods.preference import OverMeans


@dataclass(frozen=True, slots=True)
class ORPOObjective(OverMeans):
    """``NLL(chosen) - coef log sigmoid(log odds(chosen) - log odds(rejected))``.

    Hong et al. 2024, arXiv 2403.07691, equations 6 and 7. The NLL is a mean over the response's tokens, and so is the
    logprob whose odds are compared. The log odds ratio is a metric too.
    """

    coef: float = 0.1

    def __post_init__(self) -> None:
        assert self.coef > 0, "--odds_ratio_coef must be above 0"

    @property
    def scale(self) -> float:
        return self.coef

    def per_pair(self, chosen_P: Tensor, rejected_P: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        ratios_P = log_odds(chosen_P) - log_odds(rejected_P)
        return -chosen_P - self.coef * logsigmoid(ratios_P), {"log_odds_ratio": ratios_P}
