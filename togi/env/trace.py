"""The tokens of one episode. They are only ever appended; a request that does not continue what is there forks.

Text never passes here. Who renders a conversation to token ids is elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from togi.sample import FinishReason, Fork, Generation, Prompt, Rollout, Score


class Trace:
    """A tree of tokens in the order in which they came, as ``Rollout`` has them. ``prompt``: its root."""

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt
        self.forks = 0
        """Requests that did not begin with all tokens of any row before them."""
        self._tokens, self._mask = list(prompt.tokens), [False] * len(prompt.tokens)
        self._logprobs, self._versions = [0.0] * len(prompt.tokens), [0] * len(prompt.tokens)
        self._breaks = list[Fork]()
        # Each row by the places of its tokens. A row that a request has continued is replaced by the longer one.
        self._rows = [np.arange(len(prompt.tokens))]

    @property
    def sampled(self) -> int:
        """How many tokens the policy has sampled."""
        return sum(self._mask)

    def add(self, context: Sequence[int], generation: Generation) -> None:
        """A request and its answer. ``context``: all tokens that the answer follows, from the first on; at least one."""
        assert len(context) > 0, "a first token has no prediction"
        asked, tokens = np.asarray(context, dtype=np.int64), np.asarray(self._tokens, dtype=np.int64)
        common = [_common(tokens[row], asked) for row in self._rows]
        best = max(range(len(common)), key=common.__getitem__)
        row, shared = self._rows[best], common[best]
        continues = shared == len(row)
        self.forks += not continues
        # What the row lacks of the context, then the answer.
        before, start = int(row[shared - 1]) if shared > 0 else -1, len(self._tokens)
        new = [*map(int, asked[shared:]), *generation.tokens]
        if not new:
            return
        if before != start - 1:
            self._breaks.append(Fork(start, before))
        given = len(asked) - shared
        version = generation.versions[0] if generation.versions else 0
        self._tokens += new
        self._mask += [False] * given + [True] * len(generation.tokens)
        self._logprobs += [0.0] * given + list(generation.logprobs)
        self._versions += [version] * given + list(generation.versions)
        longer = np.concatenate([row[:shared], np.arange(start, start + len(new))])
        self._rows[best : best + continues] = [longer]

    def rollout(self, group_id: str, text: str, finish_reason: FinishReason, score: Score | None = None) -> Rollout:
        """The episode. ``text``: of what the policy wrote, for rewards and people."""
        after = slice(len(self.prompt.tokens), None)
        return Rollout(
            prompt=self.prompt,
            group_id=group_id,
            response_tokens=tuple(self._tokens[after]),
            response_mask=tuple(self._mask[after]),
            response_logprobs=tuple(self._logprobs[after]),
            response_text=text,
            finish_reason=finish_reason,
            versions=tuple(self._versions[after]),
            forks=tuple(self._breaks),
            score=score,
        )


def _common(row: NDArray[np.int64], asked: NDArray[np.int64]) -> int:
    """How many tokens two rows have in common from their first on."""
    length = min(len(row), len(asked))
    differ = np.flatnonzero(row[:length] != asked[:length])
    return int(differ[0]) if len(differ) else length
