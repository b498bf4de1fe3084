"""The engine's side of weight updates: expected and received tensors, the loaded version, and the probe.

The probe is a fixed text that engine and trainer both score after each update.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from togi.errors import WeightSyncError
from togi.sample import Sample
from togi.weights import adapters
from togi.weights.buckets import Manifest, TensorSpec, differences

NAMES_SHOWN = 5


class UpdateLog:
    """Checks an update from begin to finish, by the specs of tensors.

    ``open`` is True from a successful ``begin`` to the matching ``finish``. In between old and new weights are mixed. ``expired``:
    the weights are out of date, and no update has finished since.
    """

    def __init__(self, expected: Iterable[TensorSpec]) -> None:
        self.expected = tuple(expected)
        self.version = 0
        self.open = self.expired = False
        self._manifest = Manifest(0, ())
        self._missing: dict[str, TensorSpec] = {}

    @property
    def arriving(self) -> int:
        """The version of the newest update."""
        return self._manifest.version

    @property
    def adapter_scale(self) -> float | None:
        """alpha / rank of the newest update's adapter. None if it sends the whole model."""
        return self._manifest.adapter_scale

    @property
    def opening(self) -> str:
        """Why the weights cannot be used, in words for an error message."""
        if not self.open:
            return f"the weights of version {self.version} are out of date"
        return f"the weight update to version {self._manifest.version} has begun and is not finished"

    def expire(self) -> None:
        """The weights are of no use until an update has finished."""
        self.expired = True

    def begin(self, manifest: Manifest) -> None:
        """Begin an update, which may replace an unfinished one. Raises WeightSyncError, without any change, if it does not fit."""
        # check everything before any change
        compare = differences if manifest.adapter_scale is None else adapters.problems
        lines = compare(self.expected, manifest.tensors)
        if len({spec.name for spec in manifest.tensors}) != len(manifest.tensors):
            lines.append("a name appears twice")
        if lines:
            raise WeightSyncError(
                f"weight update {manifest.version} was refused and the engine keeps version {self.version}: "
                + "; ".join(lines)
            )
        self._manifest = manifest
        self._missing = {spec.name: spec for spec in manifest.tensors}
        self.open = True

    def arrive(self, tensors: Iterable[TensorSpec]) -> None:
        """Record received tensors. Raises WeightSyncError, without any change, for one that is not missing or has other specs."""
        if not self.open:
            raise WeightSyncError("a bucket of weights arrived outside an update: call begin_update first")
        specs = tuple(tensors)
        # check all tensors before any is recorded
        for spec in specs:
            wanted = self._missing.get(spec.name)
            if wanted is None:
                raise WeightSyncError(f"{spec.name} was not expected or came twice; {self.opening}")
            if wanted != spec:
                raise WeightSyncError(f"{differences((wanted,), (spec,))[0]}; {self.opening}")
        for spec in specs:
            del self._missing[spec.name]

    def check_complete(self) -> None:
        """Raise WeightSyncError unless all tensors have been received."""
        if not self.open:
            raise WeightSyncError("finish_update was called outside an update: call begin_update first")
        if self._missing:
            names = list(self._missing)
            more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
            raise WeightSyncError(f"{', '.join(names[:NAMES_SHOWN])}{more} did not arrive; {self.opening}")

    def finish(self) -> None:
        """Close the update: the weights are loaded, and ``version`` becomes the new one. Raises WeightSyncError if incomplete."""
        self.check_complete()
        self.version = self._manifest.version
        self.open = self.expired = False


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
    if not math.isfinite(difference):
        raise WeightSyncError(
            "The log-probs of a text are not finite after the weight update: the weights hold NaN or infinity, so that the model "
            "came broken or has diverged; look at the last gradient norms, lower the learning rate, and go on from an earlier "
            "checkpoint."
        )
    if difference >= PROBE_LIMIT_NATS:
        raise WeightSyncError(
            f"After the weight update engine and trainer disagree by {difference:.3f} nats a token on the same text "
            f"(limit {PROBE_LIMIT_NATS}): the engines do not hold the trainer's weights."
        )
    return difference
