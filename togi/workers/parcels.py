"""The two ends of a weight update: how a bucket leaves a rank of the actor, and how an engine opens it.

The driver passes on a *parcel*: the bucket itself (Ray puts it into its object store, where every engine on the host reads it),
the announcement of a bucket that travels over a ``Channel``, or a handle of GPU memory that both processes share. Handles are
those of ``torch.multiprocessing`` and are untested for lack of a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from togi.model.weights import Bucket, Checksum, TensorSpec
from togi.parallel.channel import Channel


@dataclass(frozen=True, slots=True)
class Announced:
    """A bucket of ``nbytes`` bytes that travels over the channel."""

    tensors: tuple[TensorSpec, ...]
    offsets: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class OnDevice:
    """A bucket in GPU memory: a function of torch and its arguments, which map it into another process."""

    tensors: tuple[TensorSpec, ...]
    offsets: tuple[int, ...]
    rebuild: Callable[..., Tensor]
    arguments: tuple[Any, ...]


Parcel = Bucket | Announced | OnDevice


class Carriage(Protocol):
    """How buckets leave one rank."""

    def carry(self, bucket: Bucket) -> Parcel | None:
        """The parcel for the driver; None on a rank that sends nothing."""
        ...

    def flush(self) -> None:
        """Called when nothing that was carried is needed any more: wait until it is sent, or free it."""
        ...


class ThroughDriver:
    """Rank 0 returns the bucket itself."""

    def __init__(self, *, sends: bool) -> None:
        self._sends = sends

    def carry(self, bucket: Bucket) -> Parcel | None:
        return bucket if self._sends else None

    def flush(self) -> None:
        """Nothing to do: Ray keeps what is in its store."""


class OverChannel:
    """Rank 0 sends over the channel while all ranks gather the next bucket."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def carry(self, bucket: Bucket) -> Parcel | None:
        buffer = bucket.as_tensor()
        self._channel.send(buffer)
        return Announced(bucket.tensors, bucket.offsets, buffer.nbytes)

    def flush(self) -> None:
        self._channel.flush()


class SameDevice:
    """Every rank shares its bucket with the engine on its GPU, and keeps it until the engine has the next one."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def carry(self, bucket: Bucket) -> Parcel | None:
        from torch.multiprocessing.reductions import reduce_tensor

        buffer = bucket.as_tensor()
        torch.accelerator.synchronize()  # the other process does not wait for the streams of this one
        # The engine may still read the last bucket, so two are alive.
        self._kept = [*self._kept[-1:], buffer]
        rebuild, arguments = reduce_tensor(buffer)  # type: ignore[no-untyped-call]
        return OnDevice(bucket.tensors, bucket.offsets, rebuild, arguments)

    def flush(self) -> None:
        self._kept.clear()


class Exporter:
    """One rank's part of a weight update: its buckets, one after the other, and a checksum of all of them."""

    def __init__(self, buckets: Iterator[Bucket], carriage: Carriage) -> None:
        self._buckets, self._carriage = buckets, carriage
        self._checksum = Checksum()

    def next(self) -> tuple[int, Parcel | None]:
        """Gather the next bucket; all ranks call together. Returns (number of its tensors, parcel)."""
        bucket = next(self._buckets)
        self._checksum.add(bucket)
        return len(bucket.tensors), self._carriage.carry(bucket)

    def finish(self) -> str:
        """Wait until the last bucket is sent. Returns the checksum of what this rank gathered."""
        self._carriage.flush()
        return self._checksum.digest()


class Inbox:
    """One engine's part of a weight update. ``channels``: the channel of announced buckets, if any."""

    def __init__(self, channels: list[Channel]) -> None:
        self._channels = channels
        self._checksum = Checksum()

    def open(self, parcel: Parcel) -> Bucket:
        """The bucket of a parcel. Blocks until it has arrived."""
        if isinstance(parcel, Bucket):
            bucket = parcel
        elif isinstance(parcel, Announced):
            (channel,) = self._channels
            bucket = Bucket.of(parcel.tensors, parcel.offsets, channel.receive(parcel.nbytes))
        else:
            bucket = Bucket.of(parcel.tensors, parcel.offsets, parcel.rebuild(*parcel.arguments))
        self._checksum.add(bucket)
        return bucket

    def checksum(self) -> str:
        return self._checksum.digest()
