"""The one tensor container of the trainer: flat packed tokens and a table of segments.

Shape letters: T packed tokens, S segments, N sequences; K tokens in the loss, sequence by sequence; U the same tokens, each
once.

A *segment* is a run of consecutive packed tokens. A segment may continue another one (its *prefix*), as a response continues a
prompt that several responses share. So segments form trees of any depth. A token attends to the chain of prefixes of its segment,
and to its own segment up to itself. A *sequence* has a loss and per-sequence values. Its tokens are those of one chain, or of
several if it forks. A packed token may be part of several sequences, and in the loss of each. In the plain layout every sequence
is one segment without a prefix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

NO_PREFIX = -1
NO_SOURCE = -1


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
    """A pack of sequences. Element i of every ``_T`` tensor is about packed token i, element k of every ``_K`` tensor about the
    k-th token in the loss.

    ``sources_T[i]`` is the packed index of the token whose hidden state predicts token i (``NO_SOURCE`` for a first token).
    The shift by one between tokens and predictions is only here, see ``predecessors``.
    The tokens in the loss come sequence by sequence, each in the order of its own tokens. ``target_sequences_K`` is the sequence
    of each. ``targets_U`` are their packed indices, ascending, each once, and ``picks_K`` is the place of each in ``targets_U``: a
    token that several sequences share may be in the loss of each. Indices and not a mask, because a device would have to be waited
    for to know how many there are.
    ``ends_N[n]`` are the segments with which sequence n ends: several if it forks, that of its last token last. Its tokens are
    those of their chains. ``order_N[n]`` is the place of sequence n in the list that the batch was packed from, ascending.
    ``streams`` are float tensors [K] by name, ``values`` tensors [N] by name. ``original``: the batch that this is a copy of.
    """

    tokens_T: Tensor
    positions_T: Tensor
    sources_T: Tensor
    targets_U: Tensor
    picks_K: Tensor
    target_sequences_K: Tensor
    segments: Segments
    ends_N: tuple[tuple[int, ...], ...]
    order_N: tuple[int, ...]
    streams: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    original: Batch | None = None

    @classmethod
    def of(
        cls,
        tokens_T: Tensor,
        segments: Segments,
        ends_N: Sequence[tuple[int, ...]],
        targets_K: Tensor,
        target_sequences_K: Tensor,
        streams: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
    ) -> Batch:
        """A batch in host memory, validated, with all that follows from these. ``targets_K``: packed indices."""
        targets_U, picks_K = torch.unique(targets_K, return_inverse=True)
        places = segment_positions(segments), predecessors(segments)
        targets = targets_U, picks_K, target_sequences_K
        return cls(
            tokens_T, *places, *targets, segments, tuple(ends_N), tuple(range(len(ends_N))), streams, values
        ).validate()

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
    def targets_K(self) -> Tensor:
        """The packed index of each token in the loss. A token that several sequences share comes for each of them."""
        return self.targets_U[self.picks_K]

    def for_each(self, values_U: Tensor) -> Tensor:
        """Entries of the tokens in the loss, each once [U, ...], as entries for every sequence that has them [K, ...]."""
        return values_U.index_select(0, self.picks_K)

    def last_tokens_N(self) -> Tensor:
        """The packed index of the last token of each sequence (int64, [N])."""
        starts, lengths = self.segments.starts_S, self.segments.lengths_S
        last = [starts[ends[-1]] + lengths[ends[-1]] - 1 for ends in self.ends_N]
        return moved(torch.tensor(last, dtype=torch.int64), self.tokens_T.device)

    def tokens_per_sequence_N(self) -> Tensor:
        """How many tokens of each sequence are in the loss (int64, [N])."""
        return tokens_per_sequence(self.target_sequences_K, self.num_sequences)

    def segments_T(self) -> Tensor:
        """The segment of each packed token (int64, [T])."""
        lengths_S = torch.tensor(self.segments.lengths_S)
        return moved(torch.repeat_interleave(torch.arange(len(self.segments)), lengths_S), self.tokens_T.device)

    def chains_NS(self) -> Tensor:
        """1 where a segment is part of a sequence, else 0 (float32, [N, S]). A shared prefix is part of several sequences."""
        chains_NS = torch.zeros(self.num_sequences, len(self.segments))
        for sequence, ends in enumerate(self.ends_N):
            for end in ends:
                chains_NS[sequence, list(self.segments.chain(end))] = 1
        return moved(chains_NS, self.tokens_T.device)

    def to(self, device: torch.device) -> Batch:
        """A copy with every tensor on ``device``, which is not waited for."""
        return replace(
            self,
            original=self.host,
            tokens_T=moved(self.tokens_T, device),
            positions_T=moved(self.positions_T, device),
            sources_T=moved(self.sources_T, device),
            targets_U=moved(self.targets_U, device),
            picks_K=moved(self.picks_K, device),
            target_sequences_K=moved(self.target_sequences_K, device),
            streams={name: moved(stream, device) for name, stream in self.streams.items()},
            values={name: moved(value, device) for name, value in self.values.items()},
        )

    def validate(self) -> Batch:
        """Check the invariants that packing must keep. Called where a batch is built; raises AssertionError."""
        total, table = self.num_tokens, self.segments
        # the shapes
        for tensor in (self.positions_T, self.sources_T):
            assert tensor.shape == (total,), "a token stream has the wrong length"
        for tensor in (self.picks_K, *self.streams.values()):
            assert tensor.shape == self.target_sequences_K.shape, "a stream has the wrong length"
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
        # the sequences: each ends somewhere, and they are in the order of the list
        assert all(self.ends_N), "a sequence without tokens"
        assert len(self.ends_N) == self.num_sequences and list(self.order_N) == sorted(self.order_N), (
            "sequences reordered"
        )
        # the loss: each of its tokens has a source and a sequence
        assert torch.equal(self.sources_T.cpu(), predecessors(table)), "sources do not follow the segment table"
        assert bool((self.targets_U.diff() > 0).all()), "the tokens in the loss are not in ascending order"
        assert bool((self.sources_T[self.targets_U] != NO_SOURCE).all()), "a token without a prediction is in the loss"
        owners_K = self.target_sequences_K
        assert bool((owners_K.diff() >= 0).all()), "the tokens in the loss do not come sequence by sequence"
        assert bool(((owners_K >= 0) & (owners_K < self.num_sequences)).all()), "a token of no sequence is in the loss"
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
    ends, runs = list[int](), [torch.arange(0)]
    for prefix, length in zip(segments.prefixes_S, segments.lengths_S, strict=True):
        first = 0 if prefix == NO_PREFIX else ends[prefix]
        ends.append(first + length)
        runs.append(torch.arange(first, first + length))
    return torch.cat(runs)
