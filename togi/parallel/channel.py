"""A one-way channel: one member sends flat buffers, all others receive them, over a process group of its own.

The group is made from a store and never registered, so it is neither the trainer's default group nor that of an engine that has
one in the same process (vLLM does). Sending overlaps with whatever the sender does next. Over nccl: written by torch's
documentation, not tested, as there was no GPU.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from togi.parallel.process import Rendezvous

NAME = "weights"
SENDER = 0


class Channel:
    """Rank 0 of the members sends. Every buffer must be received by all others, in the order in which they were sent."""

    def __init__(self, group: Any, device: torch.device) -> None:
        self.device = device
        self._group = group
        self._sending: list[tuple[Any, Tensor]] = []

    @classmethod
    def join(cls, meeting: Rendezvous, device: torch.device) -> Self:
        """Meet the other members; buffers are on ``device``, host memory travels by gloo and that of a GPU by nccl.

        Raises torch's ``DistStoreError`` or RuntimeError when they do not come in time.
        """
        limit = timedelta(seconds=meeting.timeout_s)
        store = PrefixStore(NAME, TCPStore(meeting.address, meeting.port, is_master=False, timeout=limit))
        if device.type == "cpu":
            return cls(dist.ProcessGroupGloo(store, meeting.rank, meeting.size, limit), device)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = limit
        return cls(dist.ProcessGroupNCCL(store, meeting.rank, meeting.size, options), device)

    def send(self, buffer: Tensor) -> None:
        """Begin to send ``buffer`` (bytes, on ``device``), once the one before has left. It must not change until ``flush``."""
        self.flush()
        self._sending.append((self._broadcast(buffer), buffer))

    def flush(self) -> None:
        """Wait until everything has left."""
        for work, _ in self._sending:
            self._finish(work)
        self._sending.clear()

    def receive(self, nbytes: int) -> Tensor:
        """The next ``nbytes`` bytes, in a buffer of their own."""
        buffer = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        self._finish(self._broadcast(buffer))
        return buffer

    def _broadcast(self, buffer: Tensor) -> Any:
        options = dist.BroadcastOptions()
        options.rootRank = SENDER
        return self._group.broadcast([buffer], options)

    def _finish(self, work: Any) -> None:
        work.wait()
        if self.device.type != "cpu":  # there, waiting only orders what follows on the stream
            torch.accelerator.synchronize(self.device)
