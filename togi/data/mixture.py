"""Several data sets as one list of rows: concatenated, or drawn with probabilities.

Only places are mixed, never tables: a pick is (source, row), and each record is built from its source's own row. So sets with
different columns cannot clash.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from togi.data.items import DEFAULT_SPLIT, split_items
from togi.data.precheck import parse_probs
from togi.data.source import Source, load_source
from togi.data.tables import Row, readable

DRAW = 1000


@dataclass(frozen=True, slots=True)
class Pick:
    """One row of the mixture. ``repeat``: the number of its earlier occurrences (0 for the first)."""

    source: int
    row: int
    repeat: int = 0

    @property
    def id(self) -> str:
        """Unique in the mixture and stable between runs: "source:row", then "source:row#1" for a repeat."""
        return f"{self.source}:{self.row}" + (f"#{self.repeat}" if self.repeat > 0 else "")


@dataclass(frozen=True, slots=True, eq=False)
class Mixture:
    """Data sets and the order of their rows. ``places``: (source, row, repeat) of each, shape (M, 3)."""

    sources: tuple[Source, ...]
    places: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.places)

    @property
    def picks(self) -> Iterator[Pick]:
        """The rows in order, as an iterator that does not build all picks at once."""
        return (
            Pick(*place) for start in range(0, len(self), DRAW) for place in self.places[start : start + DRAW].tolist()
        )

    def rows_used(self, source: int) -> range:
        """The distinct rows of a source that are used, always from its beginning."""
        own = self.places[self.places[:, 0] == source, 1]
        return range(int(own.max()) + 1 if len(own) > 0 else 0)

    def rows(self) -> list[Row]:
        """The row of every pick, in order, all in memory. Raises DataError for a row that cannot be read."""
        found = [source.rows.fetch(self.rows_used(index)) for index, source in enumerate(self.sources)]
        return [readable(found[pick.source][pick.row], self.place(pick)) for pick in self.picks]

    def place(self, pick: Pick) -> str:
        """The place of a pick's row in words: file and line."""
        return self.sources[pick.source].rows.place(pick.row)


def load_mixture(
    datasets: str, probs: str | None, *, split: str = DEFAULT_SPLIT, seed: int = 42, max_samples: int = 100_000_000
) -> Mixture:
    """Load comma-separated sets and mix them. Raises DataError.

    Without ``probs`` the sets are concatenated, and ``max_samples`` is shared in proportion to their sizes, so later sets never
    vanish. With ``probs`` rows are drawn until every set was used up once (short sets repeat), and ``max_samples`` truncates.
    """
    items = split_items(datasets)
    weights = None if probs is None else parse_probs(probs, len(items))
    sources = tuple(load_source(item, split) for item in items)
    sizes = [len(source.rows) for source in sources]
    places = concatenate(sizes, max_samples) if weights is None else interleave(sizes, weights, seed, max_samples)
    return Mixture(sources, _with_repeats(places, sizes))


def concatenate(sizes: Sequence[int], max_samples: int) -> NDArray[np.int64]:
    """Places (source, row), shape (M, 2): the first rows of each set, up to its share of ``max_samples``."""
    shares = proportional_shares(sizes, max_samples)
    sources = np.repeat(np.arange(len(sizes)), shares)
    rows = np.concatenate([np.arange(share) for share in shares])
    return np.stack([sources, rows], axis=1)


def proportional_shares(sizes: Sequence[int], total: int) -> list[int]:
    """Whole numbers that sum to min(total, sum of sizes), in proportion to the sizes by the largest-remainder method.

    Every set gets at least one row if ``total`` allows it.
    """
    if sum(sizes) <= total:
        return list(sizes)
    exact = [total * size / sum(sizes) for size in sizes]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    while total >= len(sizes) and 0 in shares:
        shares[shares.index(max(shares))] -= 1
        shares[shares.index(0)] += 1
    return shares


def interleave(sizes: Sequence[int], probs: Sequence[float], seed: int, max_samples: int) -> NDArray[np.int64]:
    """Places (source, row), shape (M, 2), drawn until every set was used up once; a set that runs out starts again.

    The same order as ``datasets.interleave_datasets(..., stopping_strategy="all_exhausted")``: sources are drawn in blocks of 1000
    from NumPy's default generator.
    """
    rng = np.random.default_rng(seed)
    blocks: list[NDArray[np.int64]] = []
    left = np.array(sizes)
    while (left > 0).any() and len(blocks) * DRAW < max_samples:
        blocks.append(rng.choice(len(sizes), size=DRAW, p=probs))
        left -= np.bincount(blocks[-1], minlength=len(sizes))
    drawn = np.concatenate(blocks)
    # The k-th draw of a source is its row k, modulo its size. The end is where the last set has had all rows.
    rows = np.empty_like(drawn)
    end = 0
    for source, size in enumerate(sizes):
        turns = np.flatnonzero(drawn == source)
        rows[turns] = np.arange(len(turns)) % size
        end = max(end, int(turns[size - 1]) + 1 if len(turns) >= size else len(drawn))
    return np.stack([drawn, rows], axis=1)[: min(end, max_samples)]


def _with_repeats(places: NDArray[np.int64], sizes: Sequence[int]) -> NDArray[np.int64]:
    """Places with the number of earlier occurrences: rows of a set come in turn, so it is the number of earlier rounds."""
    repeats = np.empty(len(places), dtype=np.int64)
    for source, size in enumerate(sizes):
        turns = np.flatnonzero(places[:, 0] == source)
        repeats[turns] = np.arange(len(turns)) // size
    return np.column_stack([places, repeats])
