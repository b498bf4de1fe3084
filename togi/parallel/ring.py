"""The communication of ring attention, between the ranks that share the tokens of each batch.

A rank sends to the next rank of its ring while it receives from the one before, over the group's library (nccl on accelerators,
gloo on the CPU). Not here: what is sent, and when (``togi.model.ring_attention``).
"""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from togi.parallel.process import World


class Ring:
    """The ring of ``world.ring_size`` consecutive ranks of this process. All ranks of the world must make theirs together."""

    def __init__(self, world: World) -> None:
        assert world.ring_size > 1
        self.size = world.ring_size
        self.rank = world.rank % self.size
        self._world = world
        # torch requires that every rank makes every group, also those of other rings
        groups = [dist.new_group(list(range(first, first + self.size))) for first in range(0, world.size, self.size)]
        self._group = groups[world.share]
        first = world.rank - self.rank
        self._next, self._previous = first + (self.rank + 1) % self.size, first + (self.rank - 1) % self.size

    def pass_on(self, block: Tensor, rows: int, channel: int) -> Callable[[], Tensor]:
        """Start to send ``block`` to the next rank and to receive ``rows`` rows of the same shape from the one before.

        Call the result to wait for both and get the received rows. A block without rows is not sent. ``channel`` keeps messages
        apart that are sent at the same time.
        """
        sent, received = block.contiguous(), block.new_empty(rows, *block.shape[1:])
        operations = []
        if len(sent) > 0:
            operations.append(dist.P2POp(dist.isend, sent, self._next, self._group, channel))
        if rows > 0:
            operations.append(dist.P2POp(dist.irecv, received, self._previous, self._group, channel))
        works = dist.batch_isend_irecv(operations) if operations else []

        def arrived() -> Tensor:
            with self._world.collective("ring attention"):
                for work in works:
                    work.wait()

            return received

        return arrived

    def add_up(self, tensor: Tensor) -> None:
        """Replace ``tensor`` on every rank by the sum over the ring."""
        with self._world.collective("ring outputs"):
            dist.all_reduce(tensor, group=self._group)
