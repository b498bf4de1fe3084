"""The one tensor container of the trainer: flat packed tokens and a table of segments.

Shape letters: T packed tokens, K tokens in the loss, S segments, N sequences.

A *segment* is a run of consecutive packed tokens. A segment may continue another one (its *prefix*), as a response
continues a prompt that several responses share. A token attends to the chain of prefixes of its segment, and to its own segment
up to itself. A *sequence* has a loss and per-sequence values. In the plain layout every sequence is one segment without a prefix.
In the shared-prefix layout a prompt is a segment of its own, and every response continues it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

NO_PREFIX = -1
NO_SOURCE = -1
NO_SEQUENCE = -1


@dataclass(frozen=True, slots=True)
class Segments:
    """Which packed tokens belong together and which segment continues which (``NO_PREFIX``: none)."""

    starts_S: tuple[int, ...]
    lengths_S: tuple[int, ...]
    prefixes_S: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.starts_S)

    def chain(self, segment: int) -> tuple[int, ...]:
        """The prefixes of a segment, outermost first, then the segment itself."""
        links = [segment]
        while self.prefixes_S[links[-1]] != NO_PREFIX:
            links.append(self.prefixes_S[links[-1]])
        return tuple(reversed(links))

    def context_length(self, segment: int) -> int:
        """The number of tokens before the segment's first token in its own sequence."""
        return sum(self.lengths_S[s] for s in self.chain(segment)[:-1])

    def tokens(self, segment: int) -> Tensor:
        """Packed indices of the segment's own tokens, int64."""
        start = self.starts_S[segment]
        return torch.arange(start, start + self.lengths_S[segment])

    @property
    def is_plain(self) -> bool:
        return all(prefix == NO_PREFIX for prefix in self.prefixes_S)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """A pack of sequences. Element i of every ``_T`` tensor is about token i.

    ``sources_T[i]`` is the packed index of the token whose hidden state predicts token i (``NO_SOURCE`` for a first token).
    The shift by one between tokens and predictions is only here, see ``predecessors``.
    ``sequences_T[i]`` is the sequence of token i (``NO_SEQUENCE`` for a shared prompt's tokens). ``targets_K`` are the packed
    indices of the tokens in the loss, ascending: indices and not a mask, because a device would have to be waited for to know
    how many there are.
    ``order_N[n]`` is the place of sequence n in the list that the batch was packed from. ``streams`` are float tensors [T] by
    name, ``values`` tensors [N] by name. ``original``: the batch that this is a copy of.
    """

    tokens_T: Tensor
    positions_T: Tensor
    sources_T: Tensor
    sequences_T: Tensor
    targets_K: Tensor
    segments: Segments
    order_N: tuple[int, ...]
    streams: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    original: Batch | None = None

    @property
    def host(self) -> Batch:
        """The batch that this is a copy of, in host memory: whoever needs a number of it need not wait for a device."""
        return self.original or self

    @property
    def num_tokens(self) -> int:
        return int(self.tokens_T.shape[0])

    @property
    def num_sequences(self) -> int:
        return len(self.order_N)

    @property
    def target_sequences_K(self) -> Tensor:
        """The sequence of each token in the loss."""
        return self.sequences_T[self.targets_K]

    def select(self, name: str) -> Tensor:
        """Stream ``name`` at the tokens in the loss, shape [K]. Masked entries are never read."""
        return self.streams[name][self.targets_K]

    def tokens_per_sequence_N(self) -> Tensor:
        """How many tokens of each sequence are in the loss (int64, [N])."""
        return tokens_per_sequence(self.target_sequences_K, self.num_sequences)

    def segments_T(self) -> Tensor:
        """The segment of each packed token (int64, [T])."""
        lengths_S = torch.tensor(self.segments.lengths_S)
        return moved(torch.repeat_interleave(torch.arange(len(self.segments)), lengths_S), self.tokens_T.device)

    def chains_NS(self) -> Tensor:
        """1 where a segment is part of a sequence, else 0 (float32, [N, S]). A shared prompt is part of several sequences."""
        device, table = self.sequences_T.device, self.segments
        chains_SS = torch.zeros(len(table), len(table))
        for segment in range(len(table)):
            chains_SS[segment, list(table.chain(segment))] = 1
        # the chain of each segment, added to its sequence; the first row is for NO_SEQUENCE, which is -1
        owners_S = self.sequences_T[moved(torch.tensor(table.starts_S), device)] + 1
        sums = torch.zeros(self.num_sequences + 1, len(table), device=device)
        return sums.index_add_(0, owners_S, moved(chains_SS, device))[1:].clamp_(max=1)

    def to(self, device: torch.device) -> Batch:
        """A copy with every tensor on ``device``, which is not waited for."""
        return replace(
            self,
            original=self.host,
            tokens_T=moved(self.tokens_T, device),
            positions_T=moved(self.positions_T, device),
            sources_T=moved(self.sources_T, device),
            sequences_T=moved(self.sequences_T, device),
            targets_K=moved(self.targets_K, device),
            streams={name: moved(stream, device) for name, stream in self.streams.items()},
            values={name: moved(value, device) for name, value in self.values.items()},
        )

    def validate(self) -> Batch:
        """Check the invariants that packing must keep. Called where a batch is built; raises AssertionError."""
        total, table = self.num_tokens, self.segments
        # the shapes
        for tensor in (self.positions_T, self.sources_T, self.sequences_T, *self.streams.values()):
            assert tensor.shape == (total,), "a token stream has the wrong length"
        for value in self.values.values():
            assert value.shape == (self.num_sequences,), "a per-sequence value has the wrong length"
        # the segment table
        assert sum(table.lengths_S) == total, "segments do not cover the tokens"
        assert all(length > 0 for length in table.lengths_S), "an empty segment"
        assert all(prefix < s for s, prefix in enumerate(table.prefixes_S)), (
            "a prefix must come before its continuation"
        )
        end = 0
        for start, length in zip(table.starts_S, table.lengths_S, strict=True):
            assert start == end, "segments must be contiguous"
            end = start + length
        # the loss: each of its tokens has a source and a sequence
        assert torch.equal(self.sources_T.cpu(), predecessors(table)), "sources do not follow the segment table"
        assert bool((self.targets_K.diff() > 0).all()), "the tokens in the loss are not in ascending order"
        assert bool((self.sources_T[self.targets_K] != NO_SOURCE).all()), "a token without a prediction is in the loss"
        assert bool((self.target_sequences_K != NO_SEQUENCE).all()), "a token of no sequence is in the loss"
        return self


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``. From host memory to an accelerator without waiting for what that still computes.

    A plain copy waits until the device has done all that it was given before. Only a copy from pinned memory does not.
    """
    if tensor.device.type == "cpu" and device.type != "cpu" and torch.accelerator.is_available():
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def tokens_per_sequence(sequences_K: Tensor, num_sequences: int) -> Tensor:
    """How often each sequence is in ``sequences_K`` (int64, [N]). Unlike ``torch.bincount`` it does not wait for the device."""
    counts_N = torch.zeros(num_sequences, dtype=torch.int64, device=sequences_K.device)
    return counts_N.index_add_(0, sequences_K, torch.ones_like(sequences_K))


def predecessors(segments: Segments) -> Tensor:
    """For each packed token the packed index of the token before it in its own sequence, or ``NO_SOURCE``. int64, [T].

    The first token of a continuing segment follows the last token of its prefix, wherever that lies in the pack.
    """
    sources = torch.arange(-1, sum(segments.lengths_S) - 1)
    for start, prefix in zip(segments.starts_S, segments.prefixes_S, strict=True):
        last_of_prefix = segments.starts_S[prefix] + segments.lengths_S[prefix] - 1
        sources[start] = NO_SOURCE if prefix == NO_PREFIX else last_of_prefix
    return sources


def segment_positions(segments: Segments) -> Tensor:
    """The position id of each packed token (int64, [T]), counted from the start of its sequence through its chain of prefixes."""
    runs = []
    for s, length in enumerate(segments.lengths_S):
        first = segments.context_length(s)
        runs.append(torch.arange(first, first + length))
    return torch.cat(runs)
