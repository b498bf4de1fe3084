"""A model that is only read, frozen or a learner's between two steps: log-probs of given tokens, values, scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from togi.batch import Batch
from togi.learn.ragged import even_rounds, per_sequence
from togi.model.outputs import Needs, Outputs
from togi.parallel.process import World

Arrays = tuple[NDArray[np.float32], ...]


class Scorer:
    """Runs ``module`` without gradients, in evaluation mode. All ranks call together, with as many batches as each has.

    Results come batch after batch, inside a batch in the order of the list that it was packed from. ``around`` each call
    is a context to run it in, such as one without the adapter, or with the weights on the device.
    """

    def __init__(
        self, module: nn.Module, world: World, around: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        self.module = module
        self.world = world
        self._around = around

    def logprobs(self, batches: Sequence[Batch], temperature: float = 1.0) -> Arrays:
        """Log-probs (nats) at the tokens in the loss: one array a sequence."""
        needs = Needs(logprobs=True)
        return self._per_token(batches, lambda batch: self.module(batch, needs, temperature), lambda o: o.logprobs_K)

    def routes(self, batches: Sequence[Batch]) -> Arrays:
        """The experts that each token in the loss goes to, of a mixture: an array a sequence (tokens x layers x choices)."""
        needs = Needs(routes=True)
        return self._per_token(batches, lambda batch: self.module(batch, needs), lambda o: o.routes_KMC)

    def values(self, batches: Sequence[Batch]) -> Arrays:
        """Values of the states in which the tokens in the loss were chosen, arranged like ``logprobs``."""
        needs = Needs(values=True)
        return self._per_token(batches, lambda batch: self.module(batch, needs), lambda o: o.values_K)

    def scores(self, batches: Sequence[Batch]) -> NDArray[np.float32]:
        """One score a sequence."""
        needs = Needs(scores=True)
        parts = [np.empty(0, dtype=np.float32)]
        for outputs, batch in self._run(batches, lambda batch: self.module(batch, needs)):
            parts.append(outputs.scores_N.float().cpu().numpy()[np.argsort(batch.order_N)])
        return np.concatenate(parts)

    def _per_token(
        self, batches: Sequence[Batch], forward: Callable[[Batch], Outputs], pick: Callable[[Outputs], Tensor]
    ) -> Arrays:
        runs = self._run(batches, forward)
        return tuple(part for outputs, batch in runs for part in per_sequence(pick(outputs), batch))

    def _run(self, batches: Sequence[Batch], forward: Callable[[Batch], Outputs]) -> Iterator[tuple[Outputs, Batch]]:
        self.module.eval()
        with self._around():
            for batch, real, _ in even_rounds(self.world, batches):
                with torch.no_grad():
                    outputs = forward(batch)
                if real:
                    yield outputs, batch
