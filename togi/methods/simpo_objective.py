"""The loss of SimPO. Shape letter: P pairs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from togi.algo.preference import simpo_loss
from togi.methods.preference import OverMeans


@dataclass(frozen=True, slots=True)
class SimPOObjective(OverMeans):
    """SimPO (``togi.algo.preference.simpo_loss``). Accuracy does not depend on the target margin ``gamma``."""

    beta: float = 2.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        assert self.beta > 0 and self.gamma >= 0, "--beta must be above 0 and --gamma not negative"

    @property
    def scale(self) -> float:
        return self.beta

    def per_pair(self, chosen_P: Tensor, rejected_P: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return simpo_loss(chosen_P, rejected_P, self.beta, self.gamma), {}
