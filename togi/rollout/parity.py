"""Do the engine and the trainer compute the same log-probs for the same tokens under the same weights?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Parity:
    """Absolute differences of log-probs, in nats. float32: below 1e-4; bfloat16: a mean of 0.03 to 0.05 is usual."""

    mean_abs: float
    max_abs: float


def compare(engine_logprobs: Sequence[float], trainer_logprobs: Sequence[float]) -> Parity:
    """Compare the log-probs of one probe sequence, token by token."""
    assert len(engine_logprobs) == len(trainer_logprobs) > 0
    gaps = np.abs(np.subtract(engine_logprobs, trainer_logprobs, dtype=np.float64))
    return Parity(float(gaps.mean()), float(gaps.max()))
