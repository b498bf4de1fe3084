"""Packs built by hand for tests, without the packing code under test elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from togi.batch import NO_PREFIX, Batch, Segments
from togi.model.policy import Needs, PolicyModel

Group = tuple[list[int], list[list[int]]]


def make_segments(lengths: Sequence[int], prefixes: Sequence[int]) -> Segments:
    starts = [sum(lengths[:s]) for s in range(len(lengths))]
    return Segments(tuple(starts), tuple(lengths), tuple(prefixes))


def plain_pack(groups: Sequence[Group]) -> Batch:
    """Every (prompt, response) as one segment; the response is in the loss."""
    tokens, mask, owners, lengths = [], [], [], []
    for prompt, responses in groups:
        for response in responses:
            owners += [len(lengths)] * (len(prompt) + len(response))
            lengths.append(len(prompt) + len(response))
            tokens += prompt + response
            mask += [False] * len(prompt) + [True] * len(response)
    return _batch(tokens, mask, owners, make_segments(lengths, [NO_PREFIX] * len(lengths)), len(lengths))


def shared_pack(groups: Sequence[Group]) -> Batch:
    """Every prompt once, followed by its responses as continuations."""
    tokens, mask, owners, lengths, prefixes, sequences = [], [], [], [], [], 0
    for prompt, responses in groups:
        place = len(lengths)
        for run, prefix in [(prompt, NO_PREFIX), *((response, place) for response in responses)]:
            is_prompt = prefix == NO_PREFIX
            tokens += run
            mask += [not is_prompt] * len(run)
            owners += [-1 if is_prompt else sequences] * len(run)
            sequences += not is_prompt
            lengths.append(len(run))
            prefixes.append(prefix)
    return _batch(tokens, mask, owners, make_segments(lengths, prefixes), sequences)


def random_groups(seed: int, shapes: Sequence[tuple[int, Sequence[int]]], vocab: int = 256) -> list[Group]:
    """Groups of random tokens; a shape is (prompt length, response lengths)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> list[int]:
        return torch.randint(vocab, (length,), generator=generator).tolist()

    return [(draw(prompt), [draw(length) for length in responses]) for prompt, responses in shapes]


def _batch(tokens: list[int], mask: list[bool], owners: list[int], segments: Segments, sequences: int) -> Batch:
    """``owners``: the sequence of each token, -1 for those of a shared prompt. Every sequence ends with a segment of its own."""
    targets_K, owners_T = torch.tensor(mask).nonzero().squeeze(-1), torch.tensor(owners)
    ends = {owners[start]: (segment,) for segment, start in enumerate(segments.starts_S)}
    assert len(set(range(sequences)) - set(ends)) == 0
    ends_N = [ends[sequence] for sequence in range(sequences)]
    return Batch.of(torch.tensor(tokens), segments, ends_N, targets_K, owners_T[targets_K], {}, {})


TEMPERATURE = 0.7
GROUPS = random_groups(0, [(5, [4, 4, 6]), (3, [7]), (9, [2, 3, 3, 3]), (6, [5, 5])])
NEEDS = Needs(logprobs=True, entropy=True)


def loss_of(logprobs_K: Tensor, entropy_K: Tensor) -> Tensor:
    return logprobs_K.square().sum() + entropy_K.exp().sum()


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def packed(model: PolicyModel, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    outputs = model(batch, NEEDS, TEMPERATURE)
    loss_of(outputs.logprobs_K, outputs.entropy_K).backward()
    return outputs.logprobs_K.detach(), outputs.entropy_K.detach(), gradients(model)
