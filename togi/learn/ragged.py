"""Keeping ranks in step when they have different numbers of micro-batches, and results back in the caller's order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from togi.batch import NO_PREFIX, NO_SEQUENCE, Batch, Segments, predecessors, segment_positions
from togi.model.outputs import Outputs
from togi.parallel.process import World

DUMMY_TOKENS = 2


def even_rounds(world: World, batches: Sequence[Batch]) -> Iterator[tuple[Batch, bool, bool]]:
    """This rank's batches on its device, then dummies until every rank has had equally many: (batch, is real, is last).

    Sharded models gather their weights in every forward: a rank that stopped early would leave the others waiting.
    """
    rounds = int(world.max("micro-batches", [len(batches)])[0])
    for number in range(rounds):
        real = number < len(batches)
        batch = batches[number] if real else dummy_batch()
        yield batch.to(world.device), real, number == rounds - 1


def dummy_batch() -> Batch:
    """``DUMMY_TOKENS`` tokens of no sequence, none of them in the loss."""
    segments = Segments(starts_S=(0,), lengths_S=(DUMMY_TOKENS,), prefixes_S=(NO_PREFIX,))
    return Batch(
        tokens_T=torch.zeros(DUMMY_TOKENS, dtype=torch.int64),
        positions_T=segment_positions(segments),
        sources_T=predecessors(segments),
        sequences_T=torch.full((DUMMY_TOKENS,), NO_SEQUENCE),
        loss_mask_T=torch.zeros(DUMMY_TOKENS, dtype=torch.bool),
        segments=segments,
        order_N=(),
        streams={},
        values={},
    ).validate()


def nothing(outputs: Outputs) -> Tensor:
    """The loss of a dummy: the sum over no elements, exactly 0, with a graph that reaches every parameter it can."""
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
    """Split values at the tokens in the loss by sequence, in the order of the list that the batch was packed from."""
    order_K = torch.argsort(batch.target_sequences_K, stable=True)
    sorted_K = per_token_K.detach()[order_K].float().cpu()
    parts = torch.split(sorted_K, batch.tokens_per_sequence_N().tolist())
    by_place = dict(zip(batch.order_N, parts, strict=True))
    assert len(by_place) == batch.num_sequences, "two sequences of a batch claim one place"
    return [by_place[place].numpy() for place in sorted(by_place)]
