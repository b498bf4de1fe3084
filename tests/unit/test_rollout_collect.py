"""Environments, collection and the book-keeping of updates, with scripted generation."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from togi.errors import DataError, RolloutError, WeightSyncError
from togi.rollout.collect import Generate, SingleTurn, collect_groups
from togi.sample import FinishReason, Generation, Prompt, Rollout, Sampling
from togi.weights.buckets import Manifest, TensorSpec
from togi.weights.updates import UpdateLog, check_probe, compare

SAMPLING = Sampling(max_tokens=4)


def prompts(count: int) -> list[tuple[str, Prompt]]:
    return [(f"g{i}", Prompt(f"p{i}", (i,), f"prompt {i}")) for i in range(count)]


def environment() -> SingleTurn:
    return SingleTurn(decode=lambda tokens: "/".join(map(str, tokens)), sampling=SAMPLING)


async def echo(tokens: Sequence[int], sampling: Sampling) -> Generation:
    return Generation((*tokens, 9), (-0.5, -1.5), FinishReason.STOP, (3,) * (len(tokens) + 1))


async def collected(
    source: Iterator[tuple[str, Prompt]] | list[tuple[str, Prompt]], generate: Generate, **options: int
):
    return [group async for group in collect_groups(source, environment(), generate, **options)]


def test_single_turn_keeps_every_token_and_logprob() -> None:
    rollout = asyncio.run(environment().run(Prompt("p", (5,), "five"), "g", echo))
    assert rollout == Rollout(
        prompt=Prompt("p", (5,), "five"),
        group_id="g",
        response_tokens=(5, 9),
        response_mask=(True, True),
        response_logprobs=(-0.5, -1.5),
        response_text="5/9",
        finish_reason=FinishReason.STOP,
        versions=(3, 3),
    )


def test_groups_are_whole_and_carry_their_id() -> None:
    groups = asyncio.run(collected(prompts(3), echo, n_samples=2, max_in_flight=4))
    assert [[(r.group_id, r.prompt.id) for r in group] for group in groups] == [
        [("g0", "p0")] * 2,
        [("g1", "p1")] * 2,
        [("g2", "p2")] * 2,
    ]


def test_a_straggler_does_not_hold_back_later_groups_and_the_bound_holds() -> None:
    running, peak, release = 0, 0, asyncio.Event()
    calls: list[int] = []

    async def slow_first(tokens: Sequence[int], sampling: Sampling) -> Generation:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        calls.append(tokens[0])
        if len(calls) == 1:
            await release.wait()
        await asyncio.sleep(0)
        running -= 1
        return await echo(tokens, sampling)

    async def scenario() -> list[str]:
        order = []
        async for group in collect_groups(prompts(4), environment(), slow_first, n_samples=2, max_in_flight=3):
            order.append(group[0].group_id)
            if len(order) == 3:
                release.set()
        return order

    assert asyncio.run(scenario()) == ["g1", "g2", "g3", "g0"]
    assert peak == 3
    assert sorted(calls) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_an_endless_source_is_read_only_as_far_as_needed_and_closing_cancels() -> None:
    read, cancelled = [], []

    def endless() -> Iterator[tuple[str, Prompt]]:
        i = 0
        while True:
            read.append(i)
            yield f"g{i}", Prompt(f"p{i}", (i,), "")
            i += 1

    async def only_the_first(tokens: Sequence[int], sampling: Sampling) -> Generation:
        if tokens[0] == 0:
            return await echo(tokens, sampling)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(tokens[0])
            raise
        raise AssertionError

    async def scenario() -> str:
        groups = collect_groups(endless(), environment(), only_the_first, n_samples=1, max_in_flight=3)
        first = await anext(groups)
        await groups.aclose()
        return first[0].group_id

    assert asyncio.run(scenario()) == "g0"
    assert read == [0, 1, 2]
    assert cancelled == [1, 2]


def test_a_failing_environment_is_named_and_a_user_error_passes_through() -> None:
    async def fails(tokens: Sequence[int], sampling: Sampling) -> Generation:
        if tokens[0] == 1:
            raise KeyError("tool")
        if tokens[0] == 2:
            raise DataError("row 7 is too long")
        await asyncio.sleep(60)
        return await echo(tokens, sampling)

    with pytest.raises(
        RolloutError, match=r"SingleTurn failed on prompt 'p1' \(group 'g1', sample 0\): KeyError: 'tool'"
    ):
        asyncio.run(collected(prompts(2), fails, n_samples=1, max_in_flight=2))
    with pytest.raises(DataError, match="row 7 is too long"):
        asyncio.run(collected(prompts(3)[2:], fails, n_samples=1, max_in_flight=2))


def test_seeds_differ_between_samples_and_do_not_depend_on_timing() -> None:
    def seeds(max_in_flight: int, seed: int) -> dict[int, list[int]]:
        seen: dict[int, list[int]] = {}

        async def note(tokens: Sequence[int], sampling: Sampling) -> Generation:
            assert sampling == replace(SAMPLING, seed=sampling.seed)
            assert sampling.seed is not None
            seen.setdefault(tokens[0], []).append(sampling.seed)
            return await echo(tokens, sampling)

        asyncio.run(collected(prompts(3), note, n_samples=4, max_in_flight=max_in_flight, seed=seed))
        return seen

    wide = seeds(12, 1)
    assert wide == seeds(1, 1)
    assert len({seed for group in wide.values() for seed in group}) == 12
    assert wide != seeds(12, 2)


A, B = TensorSpec("a", (2, 3), "float32"), TensorSpec("b", (4,), "float32")


def test_an_update_is_checked_from_begin_to_finish() -> None:
    log = UpdateLog([A, B])
    with pytest.raises(WeightSyncError, match="outside an update"):
        log.arrive([A])
    with pytest.raises(WeightSyncError, match="keeps version 0: b is missing"):
        log.begin(Manifest(1, (A,)))
    assert not log.open
    log.begin(Manifest(1, (B, A)))
    log.arrive([B])
    with pytest.raises(WeightSyncError, match="b was not expected or came twice"):
        log.arrive([A, B])
    with pytest.raises(WeightSyncError, match=r"a is float32\[3, 2\], expected float32\[2, 3\]"):
        log.arrive([replace(A, shape=(3, 2))])
    with pytest.raises(WeightSyncError, match="a did not arrive"):
        log.finish()
    assert (log.open, log.version) == (True, 0)
    log.arrive([A])
    log.finish()
    assert (log.open, log.version) == (False, 1)


def test_an_update_may_start_over() -> None:
    log = UpdateLog([A, B])
    log.begin(Manifest(1, (A, B)))
    log.arrive([A])
    log.begin(Manifest(2, (A, B)))
    log.arrive([A, B])
    log.finish()
    assert log.version == 2


def test_parity_is_the_mean_gap() -> None:
    assert compare([-1.0, -2.0, -3.0, -4.0], [-1.0, -2.5, -2.75, -4.0]) == 0.1875


@pytest.mark.parametrize(
    ("engine", "trainer", "sentence"),
    [
        (
            [-1.0, -3.0],
            [-1.0, -1.0],
            "After the weight update engine and trainer disagree by 1.000 nats a token on the same text",
        ),
        (
            [float("nan"), -1.0],
            [-1.0, -1.0],
            "The log-probs of a text are not finite after the weight update: the weights hold",
        ),
        (
            [-1.0, -1.0],
            [-1.0, float("-inf")],
            "The log-probs of a text are not finite after the weight update: the weights hold",
        ),
    ],
)
def test_the_probe_tells_other_weights_from_broken_ones(
    engine: list[float], trainer: list[float], sentence: str
) -> None:
    with pytest.raises(WeightSyncError) as refused:
        check_probe(compare(engine, trainer))
    assert str(refused.value).startswith(sentence)
