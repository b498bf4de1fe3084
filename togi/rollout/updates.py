"""The state of one engine's weight updates: expected tensors, received tensors, and the loaded version."""

from __future__ import annotations

from collections.abc import Iterable

from togi.errors import WeightSyncError
from togi.model import adapter_update
from togi.model.weights import Manifest, TensorSpec, differences

NAMES_SHOWN = 5


class UpdateLog:
    """Checks an update from begin to finish, by the specs of tensors.

    ``open`` is True from a successful ``begin`` to the matching ``finish``. In between old and new weights are mixed.
    """

    def __init__(self, expected: Iterable[TensorSpec]) -> None:
        self.expected = tuple(expected)
        self.version = 0
        self.open = False
        self._manifest = Manifest(0, ())
        self._missing: dict[str, TensorSpec] = {}

    @property
    def adapter_scale(self) -> float | None:
        """alpha / rank of the newest update's adapter. None if it sends the whole model."""
        return self._manifest.adapter_scale

    @property
    def opening(self) -> str:
        """The open update, in words for an error message."""
        return f"the weight update to version {self._manifest.version} has begun and is not finished"

    def begin(self, manifest: Manifest) -> None:
        """Begin an update, which may replace an unfinished one. Raises WeightSyncError, without any change, if it does not fit."""
        # check everything before any change
        compare = differences if manifest.adapter_scale is None else adapter_update.problems
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
        self.open = False
