"""The reward server over real HTTP with a scripted source, batching across requests, and how a query becomes tokens."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import aiohttp
import pytest

from tests.tiny import tiny_tokenizer
from togi.cli.main import main
from togi.config.parse import parse
from togi.config.tools import ServeRMConfig, check_serve_rm
from togi.errors import ConfigError
from togi.reward.remote import ConnectionLimits, RemoteReward
from togi.reward.server import Batcher, RewardServer, ServerLimits, read_call
from togi.reward.wire import Answer, Call, Complaint
from togi.run.serve_rm import query_tokens
from togi.sample import FinishReason, Outcome, Prompt, Rollout

Ask = Callable[..., Awaitable[tuple[int, dict[str, object]]]]
LIMITS = ServerLimits(body_bytes=2000, items=3, queue=4)


async def lengths(call: Call) -> Answer:
    if "defect" in call["queries"][0]:
        raise KeyError(call["queries"][0])
    if "late" in call["queries"][0]:
        raise Complaint("ran longer than 1 s", "make it faster", is_transient=True)
    if "wrong" in call["queries"][0]:
        raise Complaint("raised ValueError", "correct the function")
    count = len(call["queries"])
    return {"rewards": [len(query) for query in call["queries"]], "scores": [1.0] * count, "log": [0.5, None]}


def talk(session_of: Callable[[Ask, RewardServer, int], Awaitable[None]], limits: ServerLimits = LIMITS) -> None:
    """Run a server and give the conversation a function that posts a body, and the server with its port."""

    async def conversation() -> None:
        server = RewardServer(lengths, limits)
        port = await server.start("127.0.0.1", 0)
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:

            async def ask(body: object, **headers: str) -> tuple[int, dict[str, object]]:
                data = body if isinstance(body, str) else json.dumps(body)
                async with session.post("/get_reward", data=data, headers=headers) as response:
                    return response.status, await response.json()

            await session_of(ask, server, port)
        await server.close()

    asyncio.run(conversation())


def test_answers_refusals_and_metrics(caplog: pytest.LogCaptureFixture) -> None:
    async def session(ask: Ask, server: RewardServer, port: int) -> None:
        body = {"query": ["Q: a", "Q: bcd"], "prompts": ["Q: ", "Q: "], "labels": [{"x": 1}, None]}
        assert await ask(body) == (200, {"rewards": [4, 6], "scores": [1, 1], "extra_logs": {"log": [0.5, None]}})
        for wrong, status, words in (
            ("{", 400, "not JSON"),
            ("[" * 1500, 400, "not JSON"),
            ([1], 400, 'no "query"'),
            ({"query": []}, 400, "at least one text"),
            ({"query": 3}, 400, '"query" must be a text or a list of at least one text'),
            ({"query": ["a", 1]}, 400, '"query" 1 is a number, not a text'),
            ({"query": [None]}, 400, '"query" 0 is null, not a text'),
            ({"query": [True]}, 400, '"query" 0 is true or false, not a text'),
            ({"query": [["a"]]}, 400, '"query" 0 is a list, not a text'),
            ({"query": [{"a": 1}]}, 400, '"query" 0 is an object, not a text'),
            (
                {"query": ["\U0001f600", "half \ud83d"]},
                400,
                '"query" 1 has half of a surrogate pair at character 5: a text was cut inside an emoji or another such '
                "character; leave the half out",
            ),
            ({"query": ["a"], "prompts": ["\ude00"]}, 400, '"prompts" 0 has half of a surrogate pair at character 0'),
            ({"query": ["a"] * 4}, 400, "4 texts, more than the 3"),
            ({"query": ["a", "b"], "prompts": ["a"]}, 400, '"prompts" has 1 entries for 2 queries'),
            ({"query": ["a"], "prompts": [3]}, 400, '"prompts" 0 is a number, not a text'),
            ({"query": ["a" * 3000]}, 413, "Too Large"),
            ({"query": ["wrong"]}, 422, "the reward raised ValueError; correct the function"),
            ({"query": ["late"]}, 500, "ran longer than 1 s"),
            ({"query": ["defect of a secret text"]}, 500, "the server failed (KeyError)"),
        ):
            got, answer = await ask(wrong)
            assert (got, words in str(answer["error"])) == (status, True), (wrong, got, answer)
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            assert await (await session.get("/health")).json() == {"status": "ok"}
            assert (await session.get("/nothing")).status == 404
            assert (await session.get("/get_reward")).status == 405
            text = await (await session.get("/metrics")).text()
        for line in (
            'requests_total{status="200"} 1',
            'requests_total{status="400"} 15',
            "items_total 2",
            "waiting_items 0",
        ):
            assert f"togi_reward_{line}" in text.splitlines(), text

    with caplog.at_level(logging.DEBUG):
        talk(session)
    assert "a request failed with KeyError" in caplog.text
    assert "secret text" not in caplog.text


def test_a_token_is_needed_for_all_but_the_health() -> None:
    async def session(ask: Ask, server: RewardServer, port: int) -> None:
        body = {"query": ["a", "b"]}
        assert (await ask(body))[0] == 401
        assert (await ask(body, Authorization="Bearer wrong"))[0] == 401
        assert (await ask(body, Authorization="Bearer sesame"))[0] == 200
        assert (await ask(body, Authorization="bearer sesame"))[0] == 200
        assert (await ask(body, Authorization="sesame"))[0] == 401
        assert (await ask(body, Authorization="Basic sesame"))[0] == 401
        answer = await raw(port, b"POST /get_reward HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer \xff\xfe\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 401 ") and b"WWW-Authenticate: Bearer" in answer
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            assert (await session.get("/health")).status == 200
            assert (await session.get("/metrics")).status == 401
        rollout = Rollout(Prompt("p", (1,), "Q: "), "g", (2,), (True,), (0.0,), "a", FinishReason.STOP, (0,))
        for token, outcome in (("sesame", Outcome.SCORE), ("wrong", Outcome.ERROR)):
            url = f"http://127.0.0.1:{port}/get_reward"
            client = RemoteReward([url], ConnectionLimits(token=token), lambda each: each.response_text)
            assert [score.outcome for score in await client.score([rollout] * 2)] == [outcome] * 2
            await client.close()

    talk(session, ServerLimits(2000, 3, 4, "sesame"))


async def raw(port: int, request: bytes) -> bytes:
    """The first bytes of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    answer = await reader.read(2000)
    writer.close()
    return answer


def test_a_broken_body_is_the_clients_fault_and_a_client_may_go(caplog: pytest.LogCaptureFixture) -> None:
    head = b"POST /get_reward HTTP/1.1\r\nHost: a\r\nContent-Encoding: gzip\r\nContent-Length: 8\r\n\r\n"

    async def session(ask: Ask, server: RewardServer, port: int) -> None:
        answer = await raw(port, head + b"not gzip")
        assert answer.startswith(b"HTTP/1.1 400 "), answer
        assert b"the body cannot be unpacked; send it whole, in the encoding that its header names" in answer
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /get_reward HTTP/1.1\r\nHost: a\r\nContent-Length: 900\r\n\r\nhalf")
        await writer.drain()
        await asyncio.sleep(0.2)
        writer.close()
        await asyncio.sleep(0.2)
        assert server.counts.requests == {400: 1, 499: 1}

    talk(session)
    assert "failed" not in caplog.text


def test_a_full_queue_says_come_back() -> None:
    """Two requests of two queries fill the queue of four; the third is told 429, and is served when there is room."""

    async def session(ask: Ask, server: RewardServer, port: int) -> None:
        gate = asyncio.Event()

        async def slow(call: Call) -> Answer:
            await gate.wait()
            return {"rewards": [0.0] * len(call["queries"])}

        server._score = slow
        body = {"query": ["a", "b"]}
        waiting = [asyncio.create_task(ask(body)) for _ in range(2)]
        while server.counts.waiting < 4:
            await asyncio.sleep(0.01)
        assert await ask(body) == (429, {"error": "4 queries are waiting, come back later"})
        gate.set()
        assert [(await task)[0] for task in waiting] == [200, 200]
        assert (await ask(body))[0] == 200

    talk(session)


def test_closing_answers_what_came_before() -> None:
    async def session(ask: Ask, server: RewardServer, port: int) -> None:
        async def slow(call: Call) -> Answer:
            await asyncio.sleep(0.2)
            return {"rewards": [7.0] * len(call["queries"])}

        server._score = slow
        task = asyncio.create_task(ask({"query": ["a"]}))
        while server.counts.waiting == 0:
            await asyncio.sleep(0.01)
        await server.close()
        assert await task == (200, {"rewards": [7.0]})

    talk(session)


def test_one_text_and_missing_columns() -> None:
    call = read_call(b'{"query": "Q: a", "prompts": "Q: ", "labels": null}', 1)
    assert call == {"queries": ["Q: a"], "prompts": ["Q: "], "labels": [""], "responses": ["a"]}


def test_requests_share_forwards_in_order_and_within_the_budget() -> None:
    """The first sequence occupies the model; the others queue up and go into as few calls as budget and count allow."""
    gate, calls = threading.Event(), []

    def forward(sequences: Sequence[Sequence[int]]) -> list[float]:
        gate.wait(10)
        calls.append([len(tokens) for tokens in sequences])
        if any(tokens[0] == 13 for tokens in sequences):
            raise MemoryError("no memory")
        return [float(sum(tokens)) for tokens in sequences]

    async def requests(most: int | None) -> list[object]:
        batcher = Batcher(forward, max_tokens=6, max_sequences=most)
        first = asyncio.create_task(batcher.score([[5]]))
        await asyncio.sleep(0.05)
        others = [
            asyncio.create_task(batcher.score(each)) for each in ([[1, 2], [3, 4]], [[1] * 9], [[2], [13]], [[4]])
        ]
        await asyncio.sleep(0.05)
        gate.set()
        results = await asyncio.gather(first, *others, return_exceptions=True)
        batcher.close()
        return [type(result) if isinstance(result, Exception) else result for result in results]

    assert asyncio.run(requests(None)) == [[5.0], [3.0, 7.0], [9.0], MemoryError, MemoryError]
    assert calls == [[1], [2, 2], [9], [1, 1, 1]]
    calls.clear()
    assert asyncio.run(requests(1)) == [[5.0], [3.0, 7.0], [9.0], MemoryError, [4.0]]
    assert calls == [[1], [2], [2], [9], [1], [1], [1]]


def test_a_query_is_read_as_it_is() -> None:
    """<|im_end|> (258) is the end and stays; padding (259) at the ends goes; nothing is appended."""
    tokenizer = tiny_tokenizer()
    plain = tokenizer("ab")["input_ids"]
    queries = ["ab", "ab<|im_end|>", "<pad><pad>ab<|im_end|><pad>", "", "<pad>"]
    assert query_tokens(queries, tokenizer) == [plain, [*plain, 258], [*plain, 258], [], []]
    tokenizer.pad_token = "<|im_end|>"
    assert query_tokens(["<|im_end|>ab<|im_end|><|im_end|>", "ab"], tokenizer) == [[*plain, 258], plain]


NEEDED = ["--reward_func", "r.py"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["--reward_pretrain", "--reward_func"]),
        ([*NEEDED, "--reward_pretrain", "m"], ["--reward_pretrain and --reward_func exclude"]),
        (["--reward_func", "r.txt"], ["--reward_func r.txt", "Python file"]),
        ([*NEEDED, "--normalize_reward"], ["--normalize_reward", "--reward_pretrain"]),
        (["--reward_pretrain", "m", "--max_len", "20000"], ["--max_len 20000", "--max_tokens_per_gpu"]),
        ([*NEEDED, "--max_items", "9000"], ["--max_items 9000", "--max_queue"]),
        ([*NEEDED, "--host", "0.0.0.0"], ["--host 0.0.0.0", "TOGI_REWARD_TOKEN", "--allow_unauthenticated"]),
        ([*NEEDED, "--host", "example.com"], ["--host example.com"]),
    ],
)
def test_contradictions_name_the_flags(flags: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        check_serve_rm(parse(ServeRMConfig, flags, "serve-rm").config, has_token=False)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_other_addresses_need_a_token_or_a_word() -> None:
    wide = parse(ServeRMConfig, [*NEEDED, "--host", "0.0.0.0"], "serve-rm").config
    check_serve_rm(wide, has_token=True)
    check_serve_rm(wide.model_copy(update={"allow_unauthenticated": True}), has_token=False)
    for host in ("127.0.0.1", "localhost", "::1"):
        check_serve_rm(wide.model_copy(update={"host": host}), has_token=False)


def test_an_empty_token_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "token"
    empty.write_text("\n")
    assert main(["serve-rm", *NEEDED, "--token_file", str(empty)]) == 2
    assert "is empty" in capsys.readouterr().err
    assert main(["serve-rm", *NEEDED, "--token_file", str(tmp_path / "none")]) == 2
    assert "cannot be read (No such file" in capsys.readouterr().err
