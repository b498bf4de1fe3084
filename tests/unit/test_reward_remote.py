"""The client of reward servers against real HTTP: the protocol, and every way in which a server can fail."""

from __future__ import annotations

import asyncio
import logging
import threading
import time

import pytest

from tests.scripted_server import Script, free_port, lengths, resets, says, serving
from togi.errors import RewardError
from togi.reward import remote
from togi.reward.remote import ConnectionLimits, RemoteReward, is_private, proxy_of
from togi.sample import FinishReason, Outcome, Prompt, Rollout, Score


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first delay of a retry in a hundredth of its time."""
    monkeypatch.setattr(remote, "FIRST_DELAY_SECONDS", 0.005)


def rollout(text: str, label: object = "") -> Rollout:
    prompt = Prompt("p-1", (1, 2), "Q: ", label)
    return Rollout(prompt, "g", (3,), (True,), (-1.0,), text, FinishReason.STOP, (0,))


GROUP = [rollout("a", {"answer": 4}), rollout("bcd", {"answer": 4})]


def client(
    *urls: str, timeout: float = 5.0, retries: int = 1, max_pause: float = 5.0, **limits: object
) -> RemoteReward:
    return RemoteReward(
        urls,
        ConnectionLimits(timeout=timeout, retries=retries, max_pause=max_pause, **limits),
        lambda each: each.response_text + "<end>",
    )


def score(*urls: str, **settings: object) -> list[Score]:
    return asyncio.run(_score(client(*urls, **settings)))


async def _score(reward: RemoteReward) -> list[Score]:
    try:
        return await reward.score(GROUP)
    finally:
        await reward.close()


def check(url: str) -> None:
    """The trial call at the start of a run."""

    async def call() -> None:
        reward = client(url)
        try:
            await reward.check(GROUP)
        finally:
            await reward.close()

    asyncio.run(call())


def test_the_established_protocol() -> None:
    reply = {"rewards": [0.5, None], "scores": [1, 0], "extra_logs": {"words": [3, 4], "load": 0.25}, "version": "x"}
    with serving(says(reply)) as script:
        first, second = score(script.url)
    query = ["Q: a<end>", "Q: bcd<end>"]
    assert script.bodies == [{"query": query, "prompts": ["Q: ", "Q: "], "labels": [{"answer": 4}] * 2}]
    assert "Authorization" not in script.headers[0]
    assert (first.outcome, first.value) == (Outcome.SCORE, 0.5)
    assert first.components == {"remote": 0.5, "scores": 1.0, "words": 3.0, "load": 0.25}
    assert second.outcome is Outcome.ABSTAIN
    assert second.components == {"scores": 0.0, "words": 4.0, "load": 0.25}


@pytest.mark.parametrize(
    "reply", [{"rewards": [1, 2]}, [1, 2], {"rewards": [1, 2], "scores": None, "extra_logs": None}]
)
def test_shorter_forms_of_the_answer(reply: object) -> None:
    with serving(says(reply)) as script:
        assert [each.value for each in score(script.url)] == [1.0, 2.0]


@pytest.mark.parametrize("step", [says("busy", 429), says("", 502), says("", 503), says("", 504), resets])
def test_a_server_that_is_away_is_waited_for(step: object) -> None:
    with serving(step, step, step, lengths) as script:
        scores = score(script.url, retries=0)
    assert [each.value for each in scores] == [9.0, 11.0]
    assert len(script.bodies) == 4


@pytest.mark.parametrize(
    ("step", "requests", "words"),
    [
        (says("no memory", 500), 3, "answered with status 500: no memory"),
        (says("what?", 404), 1, "answered with status 404: what?"),
        (says("", 401), 1, "answered with status 401"),
        (says("", 307), 1, "answered with status 307"),
        (says("<html>"), 1, "returned '<html>', which is not JSON"),
        (says({"rewards": [1.0]}), 1, 'returned 1 "rewards" for 2 queries'),
        (
            says({"reward": [1.0, 2.0]}),
            1,
            "returned no rewards (but '{\"reward\": [1.0, 2.0]}') of prompt 'p-1'; let it answer {\"rewards\": [one number",
        ),
        (
            says({"error": "CUDA out of\n memory"}),
            1,
            "returned no rewards (but 'CUDA out of memory') of prompt 'p-1'; let it",
        ),
        (says({"detail": "no query"}, 422), 1, "answered with status 422: no query (prompt"),
        (says({"detail": [{"loc": ["body"]}]}, 422), 1, "answered with status 422: [{'loc': ['body']}] (prompt"),
        (says("x" * 300, 400), 1, f"answered with status 400: {'x' * 200}... (prompt"),
        (says('{"rewards": [1, NaN]}'), 1, 'returned nan in "rewards" for sample 1'),
        (says({"rewards": [1, "good"]}), 1, "returned the string 'good' in \"rewards\" for sample 1"),
        (says({"rewards": 1}), 1, 'returned a single number as "rewards" for 2 queries'),
        (says({"rewards": [1, 2], "extra_logs": {"a": "b"}}), 1, "\"extra_logs\" 'a'"),
    ],
)
def test_failures_are_errors_and_never_scores(step: object, requests: int, words: str) -> None:
    """Only what may pass is tried again, ``retries`` times; the message names URL and prompt."""
    with serving(step) as script:
        scores = score(script.url, retries=2)
        with pytest.raises(RewardError, match="The reward server"):
            check(script.url)
    assert [each.outcome for each in scores] == [Outcome.ERROR] * 2
    assert all(each.value != each.value for each in scores)
    assert words in scores[0].message
    assert script.url in scores[0].message and "'p-1'" in scores[0].message
    assert len(script.bodies) == requests + 1


def test_a_failure_that_passes_is_no_error() -> None:
    with serving(says("", 500), lengths) as script:
        assert [each.value for each in score(script.url, retries=1)] == [9.0, 11.0]


def test_a_server_that_hangs_is_an_error_after_the_retries() -> None:
    release = threading.Event()
    with serving(lambda _: release.wait(10) and None) as script:
        scores = score(script.url, timeout=0.2, retries=1)
        release.set()
    assert scores[0].outcome is Outcome.ERROR
    assert "gave no answer within --reward_timeout 0.2 s" in scores[0].message
    assert len(script.bodies) == 2


def test_a_request_that_breaks_a_server_which_serves_others_is_an_error() -> None:
    """Otherwise one sample that crashes its server would hold the run until the longest pause is over."""

    async def both(script: Script) -> list[Score]:
        reward = client(script.url, retries=1)
        poison, other = [rollout("poison")], [rollout("fine")]
        task = asyncio.create_task(reward.score(poison))
        while not task.done():
            await reward.score(other)
            await asyncio.sleep(0.005)
        await reward.close()
        return await task

    def breaks_on_poison(handler: object) -> None:
        body = handler.script.bodies[-1]
        (resets if "poison" in body["query"][0] else says({"rewards": [1]}))(handler)

    with serving(breaks_on_poison) as script:
        assert asyncio.run(both(script))[0].outcome is Outcome.ERROR


def test_a_server_that_is_down_pauses_the_run_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()

    async def pause() -> tuple[list[list[Score]], float, float]:
        reward = client(f"http://127.0.0.1:{port}/get_reward", max_pause=30)
        start = time.monotonic()
        tasks = [asyncio.create_task(reward.score(GROUP)) for _ in range(8)]
        await asyncio.sleep(0.3)
        assert not any(task.done() for task in tasks)
        with serving(lengths, port=port):
            results = await asyncio.gather(*tasks)
        seconds = time.monotonic() - start
        paused = reward.take_paused_seconds()
        await reward.close()
        return results, paused, seconds

    with caplog.at_level(logging.WARNING):
        results, paused, seconds = asyncio.run(pause())
    assert [[each.value for each in scores] for scores in results] == [[9.0, 11.0]] * 8
    assert 0.25 < paused <= seconds
    assert [
        record.message.partition("get_reward ")[2][:15] for record in caplog.records if record.name == remote.__name__
    ] == [
        "does not answer",
        "answers again a",
    ]


def test_the_longest_pause_is_the_end() -> None:
    url = f"http://127.0.0.1:{free_port()}/get_reward"
    with pytest.raises(RewardError, match=r"does not answer.*longest pause of 0.2 s is over \(--remote_rm_max_pause\)"):
        score(url, max_pause=0.2)
    with pytest.raises(RewardError, match=rf"The reward server {url} does not answer.*start it"):
        check(url)


def test_no_more_requests_at_once_than_allowed() -> None:
    def slow(handler: object) -> None:
        time.sleep(0.02)
        lengths(handler)

    async def many(script: Script) -> None:
        reward = client(script.url, concurrency=3)
        await asyncio.gather(*(reward.score(GROUP) for _ in range(12)))
        await reward.close()

    with serving(slow) as script:
        asyncio.run(many(script))
    assert script.most_at_once == 3


def test_balance_asks_the_least_busy_server_and_leaves_one_that_is_down() -> None:
    async def many(*urls: str) -> list[Score]:
        reward = client(*urls)
        groups = await asyncio.gather(*(reward.score(GROUP) for _ in range(8)))
        await reward.close()
        return [each for scores in groups for each in scores]

    with serving(lengths) as one, serving(lengths) as two:
        scores = asyncio.run(many(one.url, two.url))
        assert (len(one.bodies), len(two.bodies)) == (4, 4)
        scores += asyncio.run(many(f"http://127.0.0.1:{free_port()}/", two.url))
    assert [each.value for each in scores] == [9.0, 11.0] * 16


def test_a_server_that_repeats_the_secrets_is_quoted_without_them() -> None:
    with serving(says({"error": "wrong token long-secret of http://me:long-word@host/x"}, 403)) as script:
        url = script.url.replace("://", "://me:long-word@")
        (first, _) = score(url, token="long-secret")
    assert "status 403: wrong token <redacted> of http://<redacted>@host/x (prompt 'p-1')" in first.message
    assert "long-" not in first.message


def test_the_token_is_a_header_and_a_login_in_the_url_wins() -> None:
    with serving(lengths) as script:
        score(script.url, token="secret")
        score(script.url.replace("://", "://me:word@"), token="secret")
    assert [headers["Authorization"].split()[0] for headers in script.headers] == ["Bearer", "Basic"]
    assert script.headers[0]["Authorization"] == "Bearer secret"


def test_a_login_in_the_url_is_never_shown() -> None:
    with serving(says("", 404)) as script:
        message = score(script.url.replace("://", "://me:word@"))[0].message
    assert "word" not in message and "<redacted>@127.0.0.1" in message


def test_proxies_are_for_public_hosts_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    with serving(lengths) as script:
        assert [each.value for each in score(script.url)] == [9.0, 11.0]  # the proxy does not exist
    assert proxy_of("http://rewards.example.com/score") == "http://proxy.example:3128"
    for host in ("localhost", "127.0.0.1", "10.1.2.3", "192.168.0.9", "[::1]", "reward-0", "rm.default.svc"):
        assert proxy_of(f"http://{host}:5000/get_reward") is None
    assert not is_private("8.8.8.8")


def test_the_wait_doubles_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.5, 1, 2, 4, 8, 10, 10 s, each times a random factor of 0.5 to 1."""
    monkeypatch.setattr(remote, "FIRST_DELAY_SECONDS", 0.5)
    clock = [100.0]
    monkeypatch.setattr(remote.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(remote.random, "uniform", lambda low, high: high)
    server = remote.HttpServer("http://127.0.0.1:1/", ConnectionLimits())
    waits = []
    for _ in range(7):
        server._is_away("does not answer")
        server._is_away("does not answer")  # another request that fails at the same time
        waits.append(server.wait_seconds)
        clock[0] += server.wait_seconds
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0]
