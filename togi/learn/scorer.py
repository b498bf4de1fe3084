"""Forwards without gradients, by a frozen model or by a learner's between two steps: log-probs, values, scores, losses.

In this order: batches that keep ranks in step, the scorer, and an objective on held-out batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from togi.batch import NO_PREFIX, Batch, Segments
from togi.learn.objective import Objective
from togi.model.policy import Needs, Outputs
from togi.obs.metrics import Metric, merge, reduced
from togi.parallel.fsdp2 import reshard
from togi.parallel.process import World

# Keep ranks in step if they have different numbers of micro-batches, and return results in the caller's order.

DUMMY_TOKENS = 2


def even_rounds(world: World, batches: Sequence[Batch]) -> Iterator[tuple[Batch, bool, bool]]:
    """Yield (batch, is real, is last): this rank's batches on its device, then dummies until all ranks have had equally many.

    Sharded models gather their weights in every forward. A rank that stopped early would leave the others waiting.
    """
    rounds = int(world.max("micro-batches", [len(batches)])[0])
    for number in range(rounds):
        real = number < len(batches)
        batch = batches[number] if real else dummy_batch()
        yield batch.to(world.device), real, number == rounds - 1


def dummy_batch() -> Batch:
    """``DUMMY_TOKENS`` tokens of no sequence, none of them in the loss."""
    segments = Segments(starts_S=(0,), lengths_S=(DUMMY_TOKENS,), prefixes_S=(NO_PREFIX,))
    tokens_T = torch.zeros(DUMMY_TOKENS, dtype=torch.int64)
    return Batch.of(tokens_T, segments, (), tokens_T[:0], tokens_T[:0], {}, {})


def nothing(outputs: Outputs) -> Tensor:
    """The loss of a dummy batch: a sum over no elements, exactly 0, whose graph reaches the parameters of the model."""
    # what every loss reads, and no more: DeepSpeed's stage 3 waits for ever if ranks back-propagate through different outputs
    tensors = (
        outputs.logprobs_K,
        outputs.values_K,
        outputs.scores_N,
        outputs.label_logprobs_K,
        outputs.next_logits_KR,
        outputs.balance_N,
    )
    assert all(tensor.numel() == 0 for tensor in tensors), "a dummy has outputs"
    return torch.stack([tensor.sum() for tensor in tensors if tensor.requires_grad]).sum()


def per_sequence(per_token_K: Tensor, batch: Batch) -> list[NDArray[np.float32]]:
    """Split values at the tokens in the loss by sequence."""
    # in host memory: the device has nothing to do here, and is waited for once
    values_K = per_token_K.detach().float().cpu()
    parts = torch.split(values_K, batch.host.tokens_per_sequence_N().tolist())
    return [part.numpy() for part in parts]


Arrays = tuple[NDArray[np.float32], ...]


@dataclass(frozen=True, eq=False)
class Scorer:
    """Runs ``module`` without gradients, in evaluation mode. All ranks call it together, each with its own number of batches.

    Results come batch after batch, each in the order of its sequences. ``around`` makes the context for each call, such as one
    without the adapter, or with the weights on the device.
    """

    module: nn.Module
    world: World
    around: Callable[[], AbstractContextManager[None]] = nullcontext

    def logprobs(self, batches: Sequence[Batch], temperature: float = 1.0) -> Arrays:
        """Log-probs (nats) at the tokens in the loss: one array a sequence."""
        return self._per_token(batches, lambda outputs: outputs.logprobs_K, Needs(logprobs=True), temperature)

    def routes(self, batches: Sequence[Batch]) -> Arrays:
        """The experts to which a mixture routes each token in the loss: one array [tokens, layers, choices] a sequence."""
        return self._per_token(batches, lambda outputs: outputs.routes_KMC, Needs(routes=True))

    def values(self, batches: Sequence[Batch]) -> Arrays:
        """Values of the states in which the tokens in the loss were chosen: one array a sequence."""
        return self._per_token(batches, lambda outputs: outputs.values_K, Needs(values=True))

    def scores(self, batches: Sequence[Batch]) -> NDArray[np.float32]:
        """One score a sequence, in one array."""
        parts = [np.empty(0, dtype=np.float32)]
        for outputs, _ in self._run(batches, Needs(scores=True)):
            parts.append(outputs.scores_N.float().cpu().numpy())
        return np.concatenate(parts)

    def _per_token(
        self, batches: Sequence[Batch], pick: Callable[[Outputs], Tensor], needs: Needs, *temperature: float
    ) -> Arrays:
        runs = self._run(batches, needs, *temperature)
        return tuple(part for outputs, batch in runs for part in per_sequence(pick(outputs), batch))

    def _run(self, batches: Sequence[Batch], needs: Needs, *temperature: float) -> Iterator[tuple[Outputs, Batch]]:
        self.module.eval()
        with self.around():
            for batch, real, _ in even_rounds(self.world, batches):
                with torch.no_grad():
                    outputs = self.module(batch, needs, *temperature)
                # the forward of a dummy only keeps this rank in the collectives
                if real:
                    yield outputs, batch
        reshard(self.module)


# An objective on held-out batches: the same loss and metrics as in training, without gradients.
#
# Sums and counts are added over batches and ranks and divided once, so every row counts alike under any packing.


@dataclass(frozen=True, slots=True)
class Measured:
    """Part of an evaluation: the loss as sum and count, and partial metrics. The parts of one set add up (``merged``).

    ``judged``: ``Objective.judge`` of each sequence, batch after batch.
    """

    total: float
    count: float
    metrics: Mapping[str, Metric]
    judged: tuple[float, ...] = ()

    @classmethod
    def merged(cls, parts: Iterable[Measured]) -> Measured:
        """Several parts as one."""
        every = list(parts)
        metrics = merge(part.metrics for part in every)
        judged = tuple(value for part in every for value in part.judged)
        return cls(sum(part.total for part in every), sum(part.count for part in every), metrics, judged)


def measure(module: nn.Module, objective: Objective, world: World, batches: Sequence[Batch]) -> Measured:
    """Evaluate ``objective`` on this rank's batches. All ranks call it together. Returns this rank's part."""
    module.eval()
    parts = [Measured(0.0, 0.0, {})]
    for batch, real, _ in even_rounds(world, batches):
        with torch.no_grad():
            outputs = objective.forward(module, batch)
            if real:
                loss = objective.loss(outputs, batch)
                judged = tuple(objective.judge(outputs, batch).float().tolist())
                parts.append(Measured(float(loss.sum), objective.count(batch), loss.metrics, judged))
    reshard(module)
    return Measured.merged(parts)


def conclude(objective: Objective, world: World, measured: Measured) -> tuple[float, dict[str, float]]:
    """(loss, metrics) over all ranks: total / count, and the objective's summary of the merged metrics."""
    whole = Measured.merged(world.gather_shares("evaluation", measured))
    assert whole.count > 0, "nothing of the evaluation set is in the loss"
    return whole.total / whole.count, objective.summary(reduced(whole.metrics))
