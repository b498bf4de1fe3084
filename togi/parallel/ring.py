"""The processes that share the tokens of each batch: what ring attention sends, and sums over them.

Here: sending to the next rank of a ring while receiving from the one before, over whatever library the group has (nccl on
accelerators, gloo on the CPU). Not here: what is sent, and when (``togi.model.ring_attention``).
"""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from togi.parallel.process import World


class Ring:
    """This process in its ring of ``world.ring_size`` consecutive ranks. All ranks of the world must make theirs together."""

    def __init__(self, world: World) -> None:
        assert world.ring_size > 1
        self.size = world.ring_size
        self.rank = world.rank % self.size
        self._world = world
        groups = [dist.new_group(list(range(first, first + self.size))) for first in range(0, world.size, self.size)]
        self._group = groups[world.share]
        first = world.rank - self.rank
        self._next, self._previous = first + (self.rank + 1) % self.size, first + (self.rank - 1) % self.size

    def pass_on(self, block: Tensor, rows: int, channel: int) -> Callable[[], Tensor]:
        """Begin to send ``block`` to the next rank and to receive ``rows`` rows like its own from the one before.

        The result waits for both and gives what was received. Nothing is sent where there are no rows. ``channel`` tells
        messages apart that are under way at one time.
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
