"""The records that pass between rollout, reward and training: plain Python and NumPy, no torch.

``Prompt`` -> engine -> ``Generation`` -> environment -> ``Rollout`` -> reward -> ``Score`` -> ``Sample``.
Text is tokenised once, when a ``Prompt`` is made. From then on all code uses the token ids, and text is for display.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class FinishReason(StrEnum):
    """Why generation ended. Masks and penalties depend on this, never on token values."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class Outcome(StrEnum):
    """The result kind of a reward source for one rollout. A failure is never silently a score of zero."""

    SCORE = "score"
    ABSTAIN = "abstain"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of a prompt set, rendered and tokenised.

    ``id`` is unique within the mixed prompt set and stable between runs; ``label`` is the value of
    ``--label_key`` (any JSON value; "" when the flag is not set). For an environment, which begins the episode itself, there
    are the columns of the ``row`` and the row's ``messages``; empty otherwise.
    """

    id: str
    tokens: tuple[int, ...]
    text: str
    label: Any = ""
    datasource: str = "default"
    row: Mapping[str, Any] = field(default_factory=dict)
    messages: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample. ``temperature`` 0 is greedy. ``seed`` None uses the engine's own generator.

    ``repetition_penalty`` divides the positive logits of tokens that are already in the prompt or the response, and multiplies
    the negative ones (Keskar et al., CTRL, 2019, section 4.1). 1 changes nothing.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    min_tokens: int = 1
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class Generation:
    """An engine's response to one request.

    ``logprobs`` are those of the distribution that was sampled from (after temperature), one per token, in nats.
    ``versions``: of the weights that sampled each token.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    versions: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.logprobs) == len(self.versions), "streams of a generation differ in length"


class Fork(NamedTuple):
    """From token ``start`` on, tokens follow token ``parent`` and not the one at ``start`` - 1. ``parent`` -1: they follow none.

    Both count the tokens of prompt and response together, and ``parent`` < ``start``. An episode forks where its next request
    does not continue the tokens before it: what it has in common with them is there once, the rest is appended.
    """

    start: int
    parent: int


@dataclass(frozen=True, slots=True)
class Score:
    """The reward of one rollout: the sum and its named components, or the reason (``message``) why there is none.

    ``turns``: the parts of the sum that were given during the episode: (place, reward) after the response token of this place.
    """

    outcome: Outcome
    value: float = math.nan
    components: Mapping[str, float] = field(default_factory=dict)
    message: str = ""
    turns: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Rollout:
    """One finished trajectory. ``response_*`` have one entry per token after the prompt.

    ``response_mask`` is True where the policy chose the token (False for an environment's observation).
    ``group_id`` is shared by the samples of one prompt in one step. ``forks``: ascending; without one the tokens are one row.
    ``score``: what the environment itself says of the episode; None if it says nothing. ``messages``: its conversation, to show.
    ``counts``: what happened in it, by name, such as tool calls.
    """

    prompt: Prompt
    group_id: str
    response_tokens: tuple[int, ...]
    response_mask: tuple[bool, ...]
    response_logprobs: tuple[float, ...]
    response_text: str
    finish_reason: FinishReason
    versions: tuple[int, ...]
    forks: tuple[Fork, ...] = ()
    score: Score | None = None
    messages: tuple[Mapping[str, Any], ...] = ()
    counts: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n, streams = len(self.response_tokens), (self.response_mask, self.response_logprobs, self.versions)
        assert all(len(stream) == n for stream in streams), "response streams differ in length"

    @property
    def row(self) -> tuple[int, ...]:
        """The tokens that lead to the last one: all of prompt and response if the episode did not fork."""
        tokens, end, parts = (
            self.prompt.tokens + self.response_tokens,
            len(self.response_mask) + len(self.prompt.tokens),
            [],
        )
        for start, parent in reversed(self.forks):
            if start < end:
                parts.append(tokens[start:end])
                end = parent + 1
        return sum(reversed(parts), start=tokens[:end])

    @property
    def policy_version(self) -> int:
        """The newest version of the weights that sampled a token of it; 0 for no token."""
        return max(self.versions, default=0)


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One sequence ready for packing. All arrays have length L = ``len(tokens)``.

    Element i of every stream is about token i; entries where ``loss_mask`` is False are never read (they may be NaN).
    ``prompt_length`` is the number of leading tokens before the first that may be in the loss.
    ``forks``: ascending, as in ``Rollout``; a sample is one sequence of the loss however often it forks.
    """

    tokens: NDArray[np.int64]
    loss_mask: NDArray[np.bool_]
    prompt_length: int
    group_id: str
    streams: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)
    forks: tuple[Fork, ...] = ()

    def __post_init__(self) -> None:
        length = len(self.tokens)
        assert len(self.loss_mask) == length, "loss_mask and tokens differ in length"
        assert all(-1 <= fork.parent < fork.start < length for fork in self.forks), "a fork follows no earlier token"
        starts = [0, *(fork.start for fork in self.forks)]
        assert all(before < start for before, start in pairwise(starts)), "forks are not in ascending order"
        assert 0 <= self.prompt_length <= length
        assert not self.loss_mask[: self.prompt_length].any(), "a token of the prompt is in the loss"
        firsts = [0, *(fork.start for fork in self.forks if fork.parent == -1)]
        assert not any(self.loss_mask[first : first + 1].any() for first in firsts), (
            "a first token has no prediction and cannot be in the loss"
        )
        assert all(len(stream) == length for stream in self.streams.values()), "a stream and tokens differ in length"


def with_streams(samples: Sequence[Sample], streams: Mapping[str, Sequence[NDArray[np.float32]]]) -> list[Sample]:
    """Add per-token results to each sample as streams. Each array holds only the sample's tokens in the loss, in order."""
    result = []
    for n, sample in enumerate(samples):
        added = {name: _spread(arrays[n], sample.loss_mask) for name, arrays in streams.items()}
        result.append(replace(sample, streams={**sample.streams, **added}))
    return result


def _spread(values: NDArray[np.float32], mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    stream = np.full(len(mask), np.nan, dtype=np.float32)
    stream[mask] = values
    return stream
