"""What a response costs that comes near the length limit, or does not end by itself. Plain numbers."""

from __future__ import annotations


def overlong_penalty(length: int, limit: int, buffer: int, factor: float) -> float:
    """What to add to the reward, from 0 to ``-factor``: the soft overlong punishment of DAPO (arXiv 2503.14476, eq. 13).

    0 up to ``limit - buffer`` tokens, then ``factor (limit - buffer - length) / buffer``, at the limit and above ``-factor``.
    """
    assert 0 < buffer <= limit, "the buffer is the last part of the limit"
    return -factor * min(max(length - (limit - buffer), 0), buffer) / buffer


def stop_properly(reward: float, coef: float) -> float:
    """The reward of a response that the limit has cut off, after ProRL (arXiv 2505.24864).

    ``coef * reward`` for a coefficient from 0 to 1, ``coef`` itself for one below 0. A reward below 0 is made milder by the
    first, so give tasks with such rewards the second.
    """
    assert coef <= 1, "a response that is cut off must not gain"
    return coef * reward if coef >= 0 else coef
