"""The tokens of an episode: what continues, what forks, and that every token is there once."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from togi.env.trace import Trace
from togi.sample import FinishReason, Fork, Generation, Prompt, Rollout

PROMPT = Prompt("0:0", (1, 2, 3), "Q")


def answer(*tokens: int, version: int = 0) -> Generation:
    return Generation(tokens, tuple(-float(token) for token in tokens), FinishReason.STOP, (version,) * len(tokens))


def ended(trace: Trace) -> Rollout:
    return trace.rollout("g", "text", FinishReason.STOP)


def rows(rollout: Rollout) -> list[tuple[int, ...]]:
    """Every row of an episode, from its first token to a token that nothing follows."""
    tokens = rollout.prompt.tokens + rollout.response_tokens
    before = dict(rollout.forks)
    parents = [before.get(place, place - 1) for place in range(len(tokens))]
    result = []
    for leaf in sorted(set(range(len(tokens))) - set(parents)):
        path = [leaf]
        while parents[path[-1]] != -1:
            path.append(parents[path[-1]])
        result.append(tuple(tokens[place] for place in reversed(path)))
    return result


def test_turns_that_continue_are_one_row() -> None:
    trace = Trace(PROMPT)
    trace.add([1, 2, 3], answer(4, 5))
    trace.add([1, 2, 3, 4, 5, 6, 7], answer(8, version=1))
    rollout = ended(trace)
    assert rollout.response_tokens == (4, 5, 6, 7, 8)
    assert rollout.response_mask == (True, True, False, False, True)
    assert rollout.response_logprobs == (-4.0, -5.0, 0.0, 0.0, -8.0)
    assert rollout.versions == (0, 0, 1, 1, 1)
    assert (rollout.forks, trace.forks, trace.sampled, trace.last) == ((), 0, 3, 4)
    assert rollout.prompt == PROMPT


def test_a_history_that_was_written_anew_forks_where_it_differs() -> None:
    trace = Trace(PROMPT)
    trace.add([1, 2, 3], answer(4, 5))
    trace.add([1, 2, 3, 4, 9, 9], answer(8))
    rollout = ended(trace)
    # the 4 is sampled once and shared; 9, 9 and 8 follow it
    assert rollout.response_tokens == (4, 5, 9, 9, 8)
    assert rollout.response_mask == (True, True, False, False, True)
    assert (rollout.forks, trace.forks) == ((Fork(5, 3),), 1)
    assert rows(rollout) == [(1, 2, 3, 4, 5), (1, 2, 3, 4, 9, 9, 8)]
    # the older row goes on after the newer one: no token is written anew, so it is not counted
    trace.add([1, 2, 3, 4, 5, 6], answer(7))
    assert (ended(trace).forks, trace.forks) == ((Fork(5, 3), Fork(8, 4)), 1)
    assert rows(ended(trace)) == [(1, 2, 3, 4, 9, 9, 8), (1, 2, 3, 4, 5, 6, 7)]
    assert rollout.row == (1, 2, 3, 4, 9, 9, 8) and ended(trace).row == (1, 2, 3, 4, 5, 6, 7)


def test_a_request_with_nothing_in_common_follows_no_token() -> None:
    trace = Trace(PROMPT)
    trace.add([1, 2, 3], answer(4))
    trace.add([7, 8], answer(9))
    assert ended(trace).forks == (Fork(4, -1),)
    assert rows(ended(trace)) == [(1, 2, 3, 4), (7, 8, 9)]


def test_the_prompt_is_what_comes_before_the_first_sampled_token() -> None:
    trace = Trace(PROMPT)
    assert ended(trace) == Rollout(PROMPT, "g", (), (), (), "text", FinishReason.STOP, ())
    trace.add([7, 8], answer())
    trace.add([7, 8, 9], answer(4))
    rollout = ended(trace)
    assert (rollout.prompt.tokens, rollout.prompt.id, rollout.response_tokens) == ((7, 8, 9), "0:0", (4,))


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=8), st.lists(st.integers(0, 2), max_size=4)))
)
def test_every_request_is_a_path_and_every_answer_is_trained_once(asked: list[tuple[Sequence[int], list[int]]]) -> None:
    trace = Trace(PROMPT)
    for context, tokens in asked:
        trace.add(context, answer(*tokens))
    rollout = ended(trace)
    found = rows(rollout)
    assert rollout.row in ([*found, PROMPT.tokens] if not asked else found)
    for context, tokens in asked:
        whole = (*context, *tokens)
        assert any(row[: len(whole)] == whole for row in found)
    assert sum(rollout.response_mask) == sum(len(tokens) for _, tokens in asked)
