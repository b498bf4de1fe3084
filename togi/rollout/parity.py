"""Check that engine and trainer compute the same log-probs for the same tokens under the same weights.

After each weight update both score the same fixed text, the probe.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from togi.errors import WeightSyncError
from togi.sample import Sample

PROBE_TOKENS = 512
# bf16 engines differ from the trainer by 0.03 to 0.05 nats on average; half a nat means other weights.
PROBE_LIMIT_NATS = 0.5


def compare(engine_logprobs: Sequence[float], trainer_logprobs: Sequence[float] | NDArray[np.float32]) -> float:
    """The mean absolute difference of the log-probs of one probe sequence, in nats a token.

    Usual values: below 1e-4 in float32, 0.03 to 0.05 in bfloat16.
    """
    assert len(engine_logprobs) == len(trainer_logprobs) > 0
    return float(np.abs(np.subtract(engine_logprobs, trainer_logprobs, dtype=np.float64)).mean())


def probe(tokens: Sequence[int], context_length: int) -> Sample:
    """The probe as a sample, cut to the tokens that an engine of ``context_length`` can score; all but the first in the loss."""
    cut = np.asarray(tokens[: min(PROBE_TOKENS, context_length - 1)], dtype=np.int64)
    mask = np.ones(len(cut), dtype=np.bool_)
    mask[0] = False
    return Sample(cut, mask, 0, "probe")


def check_probe(difference: float) -> float:
    """Return ``difference`` (nats a token). Raises WeightSyncError if it is so large that the weights must differ."""
    if not difference < PROBE_LIMIT_NATS:
        raise WeightSyncError(
            f"After the weight update engine and trainer disagree by {difference:.3f} nats a token on the same text "
            f"(limit {PROBE_LIMIT_NATS}): the engines do not hold the trainer's weights."
        )
    return difference
