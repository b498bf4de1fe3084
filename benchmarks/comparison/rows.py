"""Rows whose lengths in tokens are known: a spread, its lengths, and texts of exactly so many tokens.

Texts are drawn from words that are one token each, with a space before them and without; so a text of n words has n tokens, and
an answer that starts with a space does not merge with its prompt. Both sides add one EOS token to an answer, which is in its
length here.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean


@dataclass(frozen=True, slots=True)
class Spread:
    """Log-normal lengths of this ``mean``, in tokens, cut to ``smallest`` .. ``largest``. ``sigma`` 0: all equal."""

    mean: float
    sigma: float = 0.0
    smallest: int = 4
    largest: int = 1024


@dataclass(frozen=True, slots=True)
class Row:
    """Lengths in tokens of a prompt and of the answers to it, each with its EOS token."""

    prompt: int
    answers: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Real tokens: the prompt counts once for each answer, whether or not it is computed once."""
        return sum(self.prompt + answer for answer in self.answers)

    @property
    def squares(self) -> int:
        """Sum over sequences of length squared, which is what attention costs."""
        return sum((self.prompt + answer) ** 2 for answer in self.answers)

    @property
    def longest(self) -> int:
        return self.prompt + max(self.answers)


def lengths(spread: Spread, count: int, rng: random.Random) -> list[int]:
    """``count`` lengths at even quantiles of the spread, in a random order; the median is moved until the mean fits."""
    quantiles = [NormalDist().inv_cdf((place + 0.5) / count) for place in range(count)]

    def at(median: float) -> list[int]:
        drawn = [median * math.exp(spread.sigma * quantile) for quantile in quantiles]
        return [round(min(max(length, spread.smallest), spread.largest)) for length in drawn]

    low, high = 1.0, 2.0 * spread.mean
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if fmean(at(middle)) < spread.mean else (low, middle)
    result = at(high)
    rng.shuffle(result)
    return result


def make_rows(prompt: Spread, answer: Spread, answers: int, count: int, seed: int) -> list[Row]:
    """``count`` rows with so many ``answers`` each."""
    rng = random.Random(seed)
    prompts = lengths(prompt, count, rng)
    drawn = [lengths(answer, count, rng) for _ in range(answers)]
    return [Row(first, tuple(rest)) for first, *rest in zip(prompts, *drawn, strict=True)]


def sorted_steps(rows: Sequence[Row], size: int) -> list[Row]:
    """The same rows in each step of ``size`` rows, the shortest first: what pads a micro-batch least."""
    steps = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [row for step in steps for row in sorted(step, key=lambda row: row.longest)]


def words_of(vocabulary: Collection[str]) -> list[str]:
    """Lower-case words that are tokens both with a space (written Ġ) before them and without, in a fixed order."""
    found = (token[1:] for token in vocabulary if re.fullmatch("Ġ[a-z]{3,8}", token))
    return sorted(word for word in found if word in vocabulary)


def text(words: Sequence[str], tokens: int, rng: random.Random) -> str:
    """So many words."""
    return " ".join(rng.choice(words) for _ in range(tokens))


def answer(words: Sequence[str], tokens: int, rng: random.Random) -> str:
    """A space and one word less than ``tokens``, which leaves room for the EOS token."""
    return " " + text(words, tokens - 1, rng)
