"""The two ends of a weight update: how a bucket leaves a rank of the actor, how it travels, and how an engine opens it.

A ``Channel`` is a process group of its own, made from a store and never registered. So it cannot clash with the trainer's default
group, or with that of an engine in the same process (vLLM has one). Sending overlaps with the sender's next work. The nccl part
follows torch's documentation and is not tested, as there was no GPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from togi.weights.buckets import Bucket, Checksum, TensorSpec, fill, grouped

NAME = "weights"
SENDER = 0
DEVICE_ARGUMENT = 6  # of torch's rebuild_cuda_tensor: the number of the GPU


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where the processes of a group meet. ``timeout_s`` is the timeout of joining and of every later collective, in seconds."""

    rank: int
    size: int
    address: str
    port: int
    timeout_s: float = 1800.0


class Channel:
    """Rank 0 of the members sends. All others must receive every buffer, in the order of sending."""

    def __init__(self, group: Any, device: torch.device) -> None:
        self.device = device
        self._group = group  # gloo's or nccl's: torch has no types for their methods
        self._sending: list[tuple[dist.Work, Tensor]] = []

    @classmethod
    def join(cls, meeting: Rendezvous, device: torch.device) -> Self:
        """Join the other members. Buffers are on ``device``; gloo sends those in host memory, nccl those on a GPU.

        Raises torch's ``DistStoreError`` or RuntimeError if the others do not join in time.
        """
        limit = timedelta(seconds=meeting.timeout_s)
        # a prefix, since other groups may use the same store
        store = PrefixStore(NAME, TCPStore(meeting.address, meeting.port, is_master=False, timeout=limit))
        if device.type == "cpu":
            channel = cls(dist.ProcessGroupGloo(store, meeting.rank, meeting.size, limit), device)
        else:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = limit
            channel = cls(dist.ProcessGroupNCCL(store, meeting.rank, meeting.size, options), device)
        # nccl connects at its first collective, and blocks until all are there. The first bucket would be too late: engines learn
        # of it only when the sender's call has returned.
        channel._finish(channel._broadcast(torch.zeros(1, dtype=torch.uint8, device=device)))
        return channel

    def send(self, buffer: Tensor) -> None:
        """Start to send ``buffer`` (bytes, on ``device``) when the one before is sent. It must not change until ``flush``."""
        # at most one buffer is being sent, so at most two are in memory
        self.flush()
        self._sending.append((self._broadcast(buffer), buffer))

    def flush(self) -> None:
        """Wait until all buffers are sent."""
        for work, _ in self._sending:
            self._finish(work)
        self._sending.clear()

    def receive(self, nbytes: int) -> Tensor:
        """Receive the next ``nbytes`` bytes, in a new buffer."""
        buffer = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        self._finish(self._broadcast(buffer))
        return buffer

    def _broadcast(self, buffer: Tensor) -> dist.Work:
        options = dist.BroadcastOptions()
        options.rootRank = SENDER
        work: dist.Work = self._group.broadcast([buffer], options)
        return work

    def _finish(self, work: dist.Work) -> None:
        work.wait()
        if self.device.type != "cpu":  # on a GPU ``wait`` only orders later work on the stream
            torch.accelerator.synchronize(self.device)


@dataclass(frozen=True, slots=True)
class Announced:
    """A bucket without its bytes. ``content``: their number, if they come over the channel, or where they are on the GPU."""

    tensors: tuple[TensorSpec, ...]
    offsets: tuple[int, ...]
    content: int | OnDevice


@dataclass(frozen=True, slots=True)
class OnDevice:
    """A buffer of another process on the same GPU. ``handle``: the arguments of torch's ``rebuild_cuda_tensor``."""

    handle: tuple[object, ...]

    def open(self) -> Tensor:
        """The buffer, mapped into this process. The GPU's number here need not be the one that it has for the sender."""
        from torch.multiprocessing.reductions import rebuild_cuda_tensor

        here = torch.accelerator.current_device_index()
        arguments = (*self.handle[:DEVICE_ARGUMENT], here, *self.handle[DEVICE_ARGUMENT + 1 :])
        buffer: Tensor = rebuild_cuda_tensor(*arguments)  # type: ignore[no-untyped-call]
        return buffer


Parcel = Bucket | Announced


class Exporter:
    """One rank's part of weight updates: its buckets, one after the other, and a checksum of each update.

    A rank that does not send only takes part in the gather, and packs nothing. Here rank 0 returns the bucket itself.
    ``device``: the memory of the buckets.
    """

    def __init__(self, *, sends: bool, device: torch.device | None = None) -> None:
        self._sends, self._device = sends, torch.device("cpu") if device is None else device

    def begin(self, tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> None:
        """Begin an update of ``tensors``, in buckets of at most ``max_bytes``."""
        self._groups, self._checksum = grouped(tensors, max_bytes), Checksum()

    def next(self) -> tuple[int, Parcel | None]:
        """Gather the next bucket; all ranks call together. Returns (number of its tensors, parcel for the driver if any)."""
        group = next(self._groups)
        self._checksum.add((spec.name, tensor) for spec, tensor in group)
        return len(group), self._carry(fill(group, self._device)) if self._sends else None

    def finish(self) -> str:
        """Wait until the last bucket is sent. Returns the checksum of what this rank gathered."""
        self._flush()
        return self._checksum.digest()

    def _carry(self, bucket: Bucket) -> Parcel:
        return bucket

    def _flush(self) -> None:
        """Wait until what was carried is sent, or free it. Ray keeps what is in its store."""


class OverChannel(Exporter):
    """Rank 0 sends over the channel while all ranks gather the next bucket."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(sends=True, device=channel.device)
        self._channel = channel

    def _carry(self, bucket: Bucket) -> Parcel:
        buffer = bucket.as_tensor()
        self._channel.send(buffer)
        return Announced(bucket.tensors, bucket.offsets, buffer.nbytes)

    def _flush(self) -> None:
        self._channel.flush()


class SameDevice(Exporter):
    """Every rank shares its bucket with the engine on its GPU, and keeps it until the engine has the next one."""

    _kept: tuple[Tensor, ...] = ()

    def _carry(self, bucket: Bucket) -> Parcel:
        from torch.multiprocessing.reductions import reduce_tensor

        buffer = bucket.as_tensor()
        torch.accelerator.synchronize()  # the other process does not wait for the streams of this one
        # The engine may still read the last bucket, so two are alive.
        self._kept = (*self._kept[-1:], buffer)
        _, arguments = reduce_tensor(buffer)  # type: ignore[no-untyped-call]
        return Announced(bucket.tensors, bucket.offsets, OnDevice(arguments))

    def _flush(self) -> None:
        self._kept = ()


class Inbox:
    """One engine's part of a weight update. ``channels``: the channel of announced buckets, if any."""

    def __init__(self, channels: list[Channel]) -> None:
        self._channels = channels
        self._checksum = Checksum()

    def open(self, parcel: Parcel) -> Bucket:
        """The bucket of a parcel. Blocks until it has arrived."""
        if isinstance(parcel, Announced):
            content = parcel.content
            data = self._channels[0].receive(content) if isinstance(content, int) else content.open()
            parcel = Bucket.of(parcel.tensors, parcel.offsets, data)
        self._checksum.add(parcel.contents())
        return parcel

    def checksum(self) -> str:
        return self._checksum.digest()
