"""The tokens of one episode. They are only ever appended; a request that does not continue what is there forks.

Text never passes here. Who renders a conversation to token ids is elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from togi.sample import FinishReason, Fork, Generation, Prompt, Rollout, Score


class Trace:
    """A tree of tokens in the order in which they came, as ``Rollout`` has them."""

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt
        self.forks = 0
        """Requests that did not begin with all tokens of a row before them."""
        self._tokens, self._mask = list[int](), list[bool]()
        self._logprobs, self._versions = list[float](), list[int]()
        self._breaks = list[Fork]()
        # Each row by the places of its tokens. A row that a request has continued is replaced by the longer one.
        self._rows = list[NDArray[np.int64]]()

    @property
    def sampled(self) -> int:
        """How many tokens the policy has sampled."""
        return sum(self._mask)

    @property
    def last(self) -> int:
        """The place of the newest token among those of the response."""
        return len(self._tokens) - 1 - self._given

    @property
    def _given(self) -> int:
        """How many tokens come before the first sampled one."""
        return self._mask.index(True) if True in self._mask else len(self._mask)

    def add(self, context: Sequence[int], generation: Generation) -> None:
        """A request and its answer. ``context``: all tokens that the answer follows, from the first on; at least one."""
        assert len(context) > 0, "a first token has no prediction"
        asked, tokens = np.asarray(context, dtype=np.int64), np.asarray(self._tokens, dtype=np.int64)
        # The row with which the context has most in common: it continues that one, or forks from it.
        common = [_common(tokens[row], asked) for row in self._rows]
        shared = max(common, default=0)
        found = common.index(shared) if shared > 0 else len(self._rows)
        row = self._rows[found] if shared > 0 else np.arange(0)
        continues = shared == len(row) > 0
        self.forks += len(self._rows) > 0 and not continues
        # What the row lacks of the context, then the answer.
        before, start = int(row[shared - 1]) if shared > 0 else -1, len(self._tokens)
        given = len(asked) - shared
        new = [*map(int, asked[shared:]), *generation.tokens]
        if not new:
            return
        if before != start - 1:
            self._breaks.append(Fork(start, before))
        version = generation.versions[0] if generation.versions else 0
        self._tokens += new
        self._mask += [False] * given + [True] * len(generation.tokens)
        self._logprobs += [0.0] * given + list(generation.logprobs)
        self._versions += [version] * given + list(generation.versions)
        longer = np.concatenate([row[:shared], np.arange(start, start + len(new))])
        self._rows[found : found + continues] = [longer]

    def rollout(self, group_id: str, text: str, finish_reason: FinishReason, score: Score | None = None) -> Rollout:
        """The episode; its prompt is what comes before the first sampled token. ``text``: of what the policy wrote, to read."""
        given = self._given
        return Rollout(
            prompt=replace(self.prompt, tokens=tuple(self._tokens[:given])) if self._tokens else self.prompt,
            group_id=group_id,
            response_tokens=tuple(self._tokens[given:]),
            response_mask=tuple(self._mask[given:]),
            response_logprobs=tuple(self._logprobs[given:]),
            response_text=text,
            finish_reason=finish_reason,
            versions=tuple(self._versions[given:]),
            forks=tuple(self._breaks),
            score=score,
        )


def _common(row: NDArray[np.int64], asked: NDArray[np.int64]) -> int:
    """How many tokens two rows have in common from their first on."""
    length = min(len(row), len(asked))
    differ = np.flatnonzero(row[:length] != asked[:length])
    return int(differ[0]) if len(differ) else length
