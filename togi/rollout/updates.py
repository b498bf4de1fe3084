"""The book-keeping of one engine's weight updates: what is expected, what has arrived, and which version is loaded."""

from __future__ import annotations

from collections.abc import Iterable

from togi.errors import WeightSyncError
from togi.model import adapter_update
from togi.model.weights import Manifest, TensorSpec, differences

NAMES_SHOWN = 5


class UpdateLog:
    """Checks an update from begin to finish. No tensors here, only their specs.

    ``open`` is True from a successful ``begin`` to the matching ``finish``: while it is, the weights are a mixture.
    """

    def __init__(self, expected: Iterable[TensorSpec]) -> None:
        self.expected = tuple(expected)
        self.version = 0
        self.open = False
        self._manifest = Manifest(0, ())
        self._missing: dict[str, TensorSpec] = {}

    @property
    def adapter_scale(self) -> float | None:
        """Of the newest update; None where it sends whole weights."""
        return self._manifest.adapter_scale

    @property
    def opening(self) -> str:
        """In words, which update is open."""
        return f"the weight update to version {self._manifest.version} has begun and is not finished"

    def begin(self, manifest: Manifest) -> None:
        """Accept a manifest, or raise and leave everything as it was. A new update may replace an unfinished one."""
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
        """Note tensors as loaded; each must be one that is still missing, with the shape and dtype of the manifest."""
        if not self.open:
            raise WeightSyncError("a bucket of weights arrived outside an update: call begin_update first")
        specs = tuple(tensors)
        for spec in specs:
            wanted = self._missing.get(spec.name)
            if wanted is None:
                raise WeightSyncError(f"{spec.name} was not expected or came twice; {self.opening}")
            if wanted != spec:
                raise WeightSyncError(f"{differences((wanted,), (spec,))[0]}; {self.opening}")
        for spec in specs:
            del self._missing[spec.name]

    def check_complete(self) -> None:
        """Raise unless every tensor has arrived."""
        if not self.open:
            raise WeightSyncError("finish_update was called outside an update: call begin_update first")
        if self._missing:
            names = list(self._missing)
            more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
            raise WeightSyncError(f"{', '.join(names[:NAMES_SHOWN])}{more} did not arrive; {self.opening}")

    def finish(self) -> None:
        """The weights are loaded and usable: the new version counts from here."""
        self.check_complete()
        self.version = self._manifest.version
        self.open = False
