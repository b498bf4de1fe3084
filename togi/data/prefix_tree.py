"""What samples have in common from their first token on, as a tree.

A *row* is a path through a sample: from a token that follows none to one that none follows. A sample without forks is one row.
Rows are sorted, so that those with a common beginning are neighbours. Neighbours then say all: rows a < b have in common the least
that any two neighbours between them have. From that come the tree of a pack (``grow``), and what any set of rows
costs (``Neighbours``), without looking at a token again.

Not here: which samples go into a pack, and the pack itself (``packing``).
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
from numpy.typing import NDArray

from togi.sample import Sample

LEAST_SHARE = 64
"""Samples share no beginning shorter than this part of the longest row: each prefix costs attention a pass of its own."""

ROOT = 0
FRESH = 2**31
"""Above every token id."""


def paths(sample: Sample) -> list[NDArray[np.int64]]:
    """The rows of a sample by the places of their tokens in it, that of its last token last."""
    if not sample.forks:
        return [np.arange(len(sample.tokens))]
    starts, parents = ([0, *(f.start for f in sample.forks)], [-1, *(f.parent for f in sample.forks)])
    followed, found = set(parents), []
    for end in (*starts[1:], len(sample.tokens)):
        runs, last = list[NDArray[np.int64]](), end - 1
        if last in followed:
            continue
        # from the last token of a run to what its first one follows, until that is nothing
        while last >= 0:
            run = bisect.bisect_right(starts, last) - 1
            runs.append(np.arange(starts[run], last + 1))
            last = parents[run]
        found.append(np.concatenate(runs[::-1]))
    return found


@dataclass(frozen=True, slots=True, eq=False)
class SortedRows:
    """Rows in lexicographic order. ``owners``: the sample of each; ``places``: of its tokens in that sample.

    ``numbers``: where each row is in the order of samples and their rows. ``common[r]``: with how many tokens row r begins like
    row r - 1; 0 for the first.
    """

    owners: list[int]
    places: list[NDArray[np.int64]]
    numbers: list[int]
    common: NDArray[np.int64]

    @classmethod
    def of(cls, samples: Sequence[Sample], *, share_prefix: bool) -> SortedRows:
        """``share_prefix``: rows are sorted by tokens. Without it they share only what is one token of one sample."""
        rows = [(owner, path) for owner, sample in enumerate(samples) for path in paths(sample)]
        fresh = count(FRESH)
        spelled = [_words(sample, fresh) if share_prefix else np.arange(len(sample.tokens)) for sample in samples]
        words = [spelled[owner][path] for owner, path in rows]
        # big-endian bytes sort as the numbers do, and are compared at once
        keys = [
            (0 if share_prefix else owner, w.astype(">u4").tobytes()) for (owner, _), w in zip(rows, words, strict=True)
        ]
        order = sorted(range(len(rows)), key=keys.__getitem__)
        common = np.zeros(len(rows), dtype=np.int64)
        for place in range(1, len(order)):
            before, own = order[place - 1], order[place]
            if share_prefix or rows[before][0] == rows[own][0]:
                common[place] = _common(words[before], words[own])
        return cls([rows[r][0] for r in order], [rows[r][1] for r in order], order, common)

    @property
    def least(self) -> int:
        """Samples share a beginning of at least so many tokens. Of fewer samples it is no more."""
        return -(-max(map(len, self.places), default=0) // LEAST_SHARE)

    def shared(self) -> NDArray[np.int64]:
        """``common`` where it is shared, else 0. Rows of one sample share what they have in common in any case."""
        kept, last = self.common >= self.least, dict[int, int]()
        for row, owner in enumerate(self.owners):
            if owner in last:
                kept[last[owner] + 1 : row + 1] = True
            last[owner] = row
        return np.where(kept, self.common, 0)


def _words(sample: Sample, fresh: Iterator[int]) -> NDArray[np.int64]:
    """The tokens, but a new number for the first token of a branch that begins like another one from the same place.

    So branches of one sample are never merged: it has as many tokens as it would have alone, for whatever counts them.
    """
    words, forks = sample.tokens, sample.forks
    starts = {fork.start for fork in forks}
    found = {(at, int(words[at + 1])) for at in {fork.parent for fork in forks} if at + 1 not in starts}
    for fork in forks:
        branch = fork.parent, int(sample.tokens[fork.start])
        if branch in found:
            words = words.copy() if words is sample.tokens else words
            words[fork.start] = next(fresh)
        found.add(branch)
    return words


def _common(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    """With how many tokens two rows begin alike."""
    length = min(len(one), len(other))
    differ = one[:length] != other[:length]
    first = int(differ.argmax())
    return first if differ[first] else length


@dataclass(frozen=True, slots=True)
class Node:
    """Tokens ``start`` to ``end`` of row ``row``, which continue those of the node ``parent`` (-1: none)."""

    row: int
    start: int
    end: int
    parent: int


def grow(rows: SortedRows) -> tuple[list[Node], list[int]]:
    """The tree of these rows, and the node with which each row ends. A row ends at the end of a node.

    A node comes after its parent, and before the next child of that. Children are in the order of their first rows' ``numbers``.
    """
    # Stage 1: rows in sorted order. ``path`` is that of the last row, outermost first; node 0 is the root, without tokens.
    ends, parents, examples = [0], [-1], [-1]
    path, finals = [ROOT], list[int]()

    def add(end: int, row: int) -> None:
        ends.append(end)
        parents.append(path[-1])
        examples.append(row)
        path.append(len(ends) - 1)

    for row, (shared, places) in enumerate(zip(rows.shared().tolist(), rows.places, strict=True)):
        left = ROOT
        while ends[path[-1]] > shared:
            left = path.pop()
        # the row leaves the last one inside of a node: cut there
        if ends[path[-1]] < shared:
            add(shared, examples[left])
            parents[left] = path[-1]
        if len(places) > shared:
            add(len(places), row)
        finals.append(path[-1])
    # Stage 2: the order of the pack, in which what came first is first.
    children: list[list[int]] = [[] for _ in ends]
    seen = {ROOT}
    for row in np.argsort(rows.numbers).tolist():
        node = finals[row]
        while node not in seen:
            seen.add(node)
            children[parents[node]].append(node)
            node = parents[node]
    order, waiting = list[int](), children[ROOT][::-1]
    while waiting:
        order.append(node := waiting.pop())
        waiting += children[node][::-1]
    place = {node: n for n, node in enumerate(order)} | {ROOT: -1}
    nodes = [Node(examples[n], ends[parents[n]], ends[n], place[parents[n]]) for n in order]
    return nodes, [place[node] for node in finals]


class Neighbours:
    """What any two of some sorted rows share: the least that those between them have in common, from a table of powers of two."""

    def __init__(self, rows: SortedRows) -> None:
        self._owners, self._least, levels = rows.owners, rows.least, [rows.common]
        while 2 * (step := 2 ** (len(levels) - 1)) <= len(rows.common):
            levels.append(np.minimum(levels[-1][:-step], levels[-1][step:]))
        self._levels = [level.tolist() for level in levels]

    def shared(self, one: int, other: int) -> int:
        """Tokens that row ``one`` shares with the later row ``other``."""
        level = (other - one).bit_length() - 1
        least: list[int] = self._levels[level]
        common = min(least[one + 1], least[other + 1 - (1 << level)])
        return common if common >= self._least or self._owners[one] == self._owners[other] else 0
