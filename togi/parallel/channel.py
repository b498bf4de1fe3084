"""A broadcast channel for weight updates: one member sends flat buffers, all others receive them, over a process group of its own.

The group is made from a store and never registered. So it cannot clash with the trainer's default group, or with that of an
engine in the same process (vLLM has one). Sending overlaps with the sender's next work. The nccl part follows torch's
documentation and is not tested, as there was no GPU.
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
    """Rank 0 of the members sends. All others must receive every buffer, in the order of sending."""

    def __init__(self, group: Any, device: torch.device) -> None:
        self.device = device
        self._group = group
        self._sending: list[tuple[Any, Tensor]] = []

    @classmethod
    def join(cls, meeting: Rendezvous, device: torch.device) -> Self:
        """Join the other members. Buffers are on ``device``; gloo sends those in host memory, nccl those on a GPU.

        Raises torch's ``DistStoreError`` or RuntimeError if the others do not join in time.
        """
        limit = timedelta(seconds=meeting.timeout_s)
        # a prefix, since other groups may use the same store
        store = PrefixStore(NAME, TCPStore(meeting.address, meeting.port, is_master=False, timeout=limit))
        if device.type == "cpu":
            return cls(dist.ProcessGroupGloo(store, meeting.rank, meeting.size, limit), device)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = limit
        return cls(dist.ProcessGroupNCCL(store, meeting.rank, meeting.size, options), device)

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

    def _broadcast(self, buffer: Tensor) -> Any:
        options = dist.BroadcastOptions()
        options.rootRank = SENDER
        return self._group.broadcast([buffer], options)

    def _finish(self, work: Any) -> None:
        work.wait()
        if self.device.type != "cpu":  # on a GPU ``wait`` only orders later work on the stream
            torch.accelerator.synchronize(self.device)
