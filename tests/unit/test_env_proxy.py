"""The recording proxy through the official client: what was sampled is what is recorded, token by token."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Coroutine
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from tests.scripted_agent import LIMITS, PROMPT, SAMPLING, ChatML, Policy, answers, episode, sampled, smol, whole
from togi.data.chat import visible
from togi.env.proxy import Proxy
from togi.env.session import Limits
from togi.sample import FinishReason

USER = {"role": "user", "content": "What is 6 * 7?"}
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
        "strict": True,
    },
}


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 30))


def test_a_chat_of_several_turns_is_one_row_of_the_tokens_that_were_sampled() -> None:
    async def play() -> None:
        policy = Policy(smol(), answers("It is 42.", "Indeed so", "Bye"))
        async with episode(policy.generate) as (client, session):
            messages: list[Any] = [USER]
            for question in ("Really?", "Goodbye", ""):
                reply = await client.chat.completions.create(model="m", messages=messages)
                messages += [reply.choices[0].message, {"role": "user", "content": question}]
            # in and out: the tokens of the last request
            assert reply.usage.prompt_tokens == len(policy.contexts[-1])
            assert reply.usage.completion_tokens == len("Bye") + 1
            rollout = session.rollout("g")
        assert [each.content for each in messages[1::2]] == ["It is 42.", "Indeed so", "Bye"]
        # One row: the last context with its answer, in which the tokenizer would write none of the three answers so.
        assert whole(rollout) == policy.contexts[-1] + policy.sampled[-1]
        assert policy.contexts[1][: len(policy.contexts[0]) + 10] == policy.contexts[0] + policy.sampled[0]
        assert sampled(rollout) == sum(policy.sampled, ())
        assert (rollout.forks, session.forks, session.redrawn, rollout.finish_reason) == ((), 0, 0, FinishReason.STOP)
        assert rollout.response_logprobs[:2] == (-1 / 2, -1 / 3) and rollout.versions[-1] == 2
        told = ChatML(smol()).first([USER, {"role": "assistant", "content": "It is 42."}], ())
        assert told[: len(policy.contexts[1])] != policy.contexts[1]
        assert json.loads(json.dumps(rollout.messages))[0] == USER and len(rollout.messages) == 6
        assert rollout.counts == {"requests": 3, "retries": 0, "forks": 0, "redrawn": 0}

    run(play())


def test_a_stream_says_the_same_and_ends_with_its_usage() -> None:
    async def play() -> None:
        text = "Well, " * 100
        policy = Policy(smol(), answers(text, text))
        sampling = SAMPLING.__class__(max_tokens=700)
        async with episode(policy.generate, sampling) as (client, session):
            asked: dict[str, Any] = {"model": "m", "messages": [USER], "logprobs": True}
            plain = await client.chat.completions.create(**asked)
            stream = await client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
            chunks = [chunk async for chunk in stream]
            rollout = session.rollout("g")
        said = [chunk.choices[0] for chunk in chunks if chunk.choices]
        assert "".join(choice.delta.content or "" for choice in said) == text == plain.choices[0].message.content
        assert len(said) == 5, "role, three pieces of 256 characters, reason"
        assert (said[0].delta.role, said[-1].finish_reason) == ("assistant", "stop")
        values = [entry.logprob for choice in said if choice.logprobs for entry in choice.logprobs.content]
        assert values == [-2 / (n + 2) for n in range(601)]
        assert [entry.token for entry in plain.choices[0].logprobs.content[-2:]] == [" ", "<|im_end|>"]
        assert chunks[-1].usage == plain.usage and plain.usage.completion_tokens == 601
        # The same body without a retry's header is a new sample: a branch of the same prompt.
        assert sampled(rollout) == policy.sampled[0] + policy.sampled[1] and session.forks == 1

    run(play())


def test_calls_of_tools_come_back_as_calls_and_their_results_continue_the_row() -> None:
    async def play() -> None:
        call = '<tool_call>{"arguments": {"b":2,"a": 1}, "name": "add"}</tool_call>'
        policy = Policy(smol(), answers(f"<think>sum</think>So:{call}{call}", "3"))
        sampling = SAMPLING.__class__(max_tokens=700)
        async with episode(policy.generate, sampling) as (client, session):
            first = await client.chat.completions.create(model="m", messages=[USER], tools=[ADD])
            (choice,) = first.choices
            assert (choice.finish_reason, choice.message.content) == ("tool_calls", "So:")
            assert choice.message.reasoning_content == "sum"
            assert [
                (made.function.name, json.loads(made.function.arguments)) for made in choice.message.tool_calls
            ] == [("add", {"a": 1, "b": 2})] * 2
            results = [{"role": "tool", "tool_call_id": made.id, "content": "3"} for made in choice.message.tool_calls]
            asked: Any = {"model": "m", "messages": [USER, choice.message, *results], "tools": [ADD]}
            async with client.chat.completions.stream(**asked) as stream:
                last = await stream.get_final_completion()
            assert last.choices[0].message.content == "3"
        assert '"strict"' not in visible(smol(), policy.contexts[0]) and '"Adds."' in visible(
            smol(), policy.contexts[0]
        )
        # The order and the spaces of the arguments are the policy's own, and the client has sent them back otherwise.
        assert (
            policy.contexts[1][: len(policy.contexts[0] + policy.sampled[0])] == policy.contexts[0] + policy.sampled[0]
        )
        assert (session.forks, session.redrawn) == (0, 0) and "'raw'" not in str(session.transcript)

    run(play())


def test_an_edited_history_forks_and_keeps_what_is_the_same() -> None:
    async def play() -> None:
        policy = Policy(smol(), answers("one", "two", "three"))
        async with episode(policy.generate) as (client, session):
            first = await client.chat.completions.create(model="m", messages=[USER])
            answer = first.choices[0].message
            again: list[Any] = [USER, answer, {"role": "user", "content": "More"}]
            await client.chat.completions.create(model="m", messages=again)
            edited: list[Any] = [USER, {"role": "assistant", "content": "one!"}, {"role": "user", "content": "More"}]
            await client.chat.completions.create(model="m", messages=edited)
            rollout = session.rollout("g")
        assert (session.forks, session.redrawn, len(rollout.forks)) == (1, 0, 1)
        # The fork leaves where the edited text is tokenised otherwise, after the question.
        assert rollout.forks[0].parent == len(policy.contexts[0]) - 1
        assert [entry["continues"] for entry in session.transcript] == [None, 0, None]
        assert sampled(rollout) == sum(policy.sampled, ())

    run(play())


def test_several_choices_are_branches_and_each_can_be_continued() -> None:
    async def play() -> None:
        policy = Policy(smol(), answers("left", "right", "on"))
        async with episode(policy.generate) as (client, session):
            reply = await client.chat.completions.create(model="m", messages=[USER], n=2)
            texts = [choice.message.content for choice in reply.choices]
            assert texts == ["left", "right"] and reply.usage.completion_tokens == 5 + 6
            messages: list[Any] = [USER, reply.choices[0].message, {"role": "user", "content": "Go"}]
            await client.chat.completions.create(model="m", messages=messages)
            rollout = session.rollout("g")
        length = len(policy.contexts[0])
        assert policy.contexts[2][: length + 5] == policy.contexts[0] + policy.sampled[0]
        # left, right beside it, and what follows left.
        assert [fork.parent for fork in rollout.forks] == [length - 1, length + 4]
        assert sampled(rollout) == sum(policy.sampled, ()) and session.forks == 1 and session.requests == 2

    run(play())


def test_a_stop_string_ends_an_answer_after_the_token_that_completes_it() -> None:
    async def play() -> None:
        policy = Policy(smol(), answers("Act: x\nObs: y", "Act: x\nObs: y", "no end", "6"))
        async with episode(policy.generate) as (client, session):
            chat = await client.chat.completions.create(model="m", messages=[USER], stop=["zzz", "Obs:"])
            assert (chat.choices[0].message.content, chat.choices[0].finish_reason) == ("Act: x\n", "stop")
            assert chat.usage.completion_tokens == len("Act: x\nObs:")
            # A text that goes on after the stop string goes on after its tokens.
            text = await client.completions.create(model="m", prompt="Q: 1\n", stop="Obs:", max_tokens=60)
            assert text.choices[0].text == "Act: x\n"
            await client.completions.create(model="m", prompt="Q: 1\nAct: x\nObs: 5\n", max_tokens=60)
            # In a chat the answer stands for its tokens, the stop string included.
            messages: list[Any] = [USER, chat.choices[0].message, {"role": "user", "content": "5"}]
            await client.chat.completions.create(model="m", messages=messages)
            rollout = session.rollout("g")
        stopped = policy.spelled("Act: x\nObs:")
        assert policy.contexts[2][: len(policy.contexts[1]) + len(stopped)] == policy.contexts[1] + stopped
        assert visible(smol(), policy.contexts[2]) == "Q: 1\nAct: x\nObs: 5\n"
        assert policy.contexts[3][: len(policy.contexts[0]) + len(stopped)] == policy.contexts[0] + stopped
        assert sampled(rollout) == stopped + stopped + policy.sampled[2] + policy.sampled[3]

    run(play())


def test_text_completions_take_text_and_tokens_and_go_on_from_what_was_sampled() -> None:
    async def play() -> None:
        policy = Policy(smol(), answers("abc", "def", "ghi", "jkl", "mno"))
        async with episode(policy.generate) as (client, session):
            first = await client.completions.create(model="m", prompt="Hello", max_tokens=60, logprobs=1)
            assert (first.choices[0].text, first.choices[0].finish_reason) == ("abc", "stop")
            assert first.choices[0].logprobs.token_logprobs == [-1 / 2, -1 / 3, -1 / 4, -1 / 5]
            assert first.choices[0].logprobs.tokens == ["a", "b", "c", "<|im_end|>"]
            # The end of the turn was not seen as text: without it the prompt goes on after c, with it after the end.
            await client.completions.create(model="m", prompt="Helloabc and", max_tokens=60)
            await client.completions.create(model="m", prompt="Helloabc<|im_end|>\n", max_tokens=60)
            start = policy.contexts[0]
            assert policy.contexts[1][: len(start) + 3] == start + policy.sampled[0][:3]
            assert policy.contexts[2][: len(start) + 4] == start + policy.sampled[0]
            # Token ids are taken as they are, several prompts at once.
            two: Any = [[1, 2, 3], list(start + policy.sampled[0])]
            stream = await client.completions.create(model="m", prompt=two, max_tokens=2, stream=True)
            chunks = [chunk.choices[0] async for chunk in stream]
            assert [(chunk.index, chunk.text, chunk.finish_reason) for chunk in chunks] == [
                (0, "jk", None),
                (0, "", "length"),
                (1, "mn", None),
                (1, "", "length"),
            ]
        assert policy.contexts[3:] == [(1, 2, 3), start + policy.sampled[0]]
        assert sampled(session.rollout("g")) == sum(policy.sampled, ())

    run(play())


def test_responses_go_on_by_items_and_by_the_name_of_the_last_one() -> None:
    async def play() -> None:
        call = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
        policy = Policy(smol(), answers(f"<think>hm</think>{call}", "Three", "Four"))
        tool: Any = {"type": "function", **ADD["function"]}
        sampling = SAMPLING.__class__(max_tokens=700)
        async with episode(policy.generate, sampling) as (client, session):
            common: Any = {"model": "m", "instructions": "Be brief.", "tools": [tool]}
            first = await client.responses.create(input="1 + 2?", **common)
            assert [item.type for item in first.output] == ["reasoning", "function_call"]
            made = first.output[1]
            assert (made.name, json.loads(made.arguments), first.status) == ("add", {"a": 1}, "completed")
            result = {"type": "function_call_output", "call_id": made.call_id, "output": "3"}
            items: Any = [{"role": "user", "content": "1 + 2?"}, *first.output, result]
            async with client.responses.stream(input=items, **common) as stream:
                kinds = [event.type async for event in stream]
                second = await stream.get_final_response()
            assert second.output_text == "Three" and second.usage.output_tokens == 6
            assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
            assert "response.output_text.delta" in kinds
            third = await client.responses.create(input="And?", previous_response_id=second.id, **common)
            assert third.output_text == "Four"
            with pytest.raises(openai.BadRequestError, match="no response 'resp_x'"):
                await client.responses.create(input="And?", previous_response_id="resp_x", model="m")
        assert (session.forks, session.requests) == (0, 3)
        assert whole(session.rollout("g")) == policy.contexts[2] + policy.sampled[2]
        assert sampled(session.rollout("g")) == sum(policy.sampled, ())

    run(play())


def test_a_retry_gets_the_answer_that_its_client_lost() -> None:
    async def play() -> None:
        policy = Policy(smol(), lambda context, number: f"answer {number}<|im_end|>")
        policy.gate.clear()
        body: Any = {"model": "m", "messages": [USER]}
        async with episode(policy.generate, max_retries=0) as (client, session):
            # Two clients ask the same. Both leave while it is sampled.
            for _ in range(2):
                with pytest.raises(openai.APITimeoutError):
                    await client.with_options(timeout=0.2).chat.completions.create(**body)
            again: Any = {"extra_headers": {"x-stainless-retry-count": "1"}}
            retries = [asyncio.create_task(client.chat.completions.create(**body, **again)) for _ in range(2)]
            while session.retries < 2:
                await asyncio.sleep(0.01)
            policy.gate.set()
            texts = {(await retry).choices[0].message.content for retry in retries}
            assert texts == {"answer 0", "answer 1"}, "each its own"
            assert (session.requests, len(policy.sampled)) == (2, 2)
            # After all were delivered a retry gets the newest; without the header it is a new sample.
            late = await client.chat.completions.create(**body, **again)
            assert late.choices[0].message.content == "answer 1"
            new = await client.chat.completions.create(**body)
            assert new.choices[0].message.content == "answer 2"
            rollout = session.rollout("g")
        assert sampled(rollout) == sum(policy.sampled, ()) and rollout.counts["retries"] == 3

    run(play())


def test_the_official_client_retries_by_itself_and_a_stream_that_was_cut_is_told_again() -> None:
    async def play() -> None:
        policy = Policy(smol(), answers("slow", "x" * 40))
        policy.gate.clear()
        async with episode(policy.generate, timeout=0.3, max_retries=3) as (client, session):
            asyncio.get_running_loop().call_later(0.8, policy.gate.set)
            reply = await client.chat.completions.create(model="m", messages=[USER])
            assert reply.choices[0].message.content == "slow" and session.retries >= 1
            body: Any = {"model": "m", "messages": [USER], "stream": True, "extra_headers": {"Idempotency-Key": "a"}}
            cut = await client.chat.completions.create(**body)
            async for _ in cut:
                break
            await cut.close()
            whole_stream = [chunk async for chunk in await client.chat.completions.create(**body)]
            assert "".join(chunk.choices[0].delta.content or "" for chunk in whole_stream) == "x" * 40
            with pytest.raises(openai.BadRequestError, match="Idempotency-Key"):
                await client.chat.completions.create(**body | {"messages": [USER, USER]})
        assert sampled(session.rollout("g")) == sum(policy.sampled, ()) and session.requests == 2

    run(play())


def test_the_budget_is_that_of_the_episode() -> None:
    async def play() -> None:
        policy = Policy(smol(), answers("12345", "123456789", "1"))
        async with episode(policy.generate, limits=Limits(10, 10, 2000)) as (client, session):
            await client.chat.completions.create(model="m", messages=[USER])
            cut = await client.chat.completions.create(model="m", messages=[USER], max_completion_tokens=3000)
            assert (cut.choices[0].finish_reason, cut.choices[0].message.content) == ("length", "1234")
            with pytest.raises(openai.BadRequestError, match="may sample 10 tokens, and 0 of them are left") as error:
                await client.chat.completions.create(model="m", messages=[USER])
            assert error.value.code == "context_length_exceeded"
        assert [each.max_tokens for each in policy.sampling] == [10, 4]
        rollout = session.rollout("g")
        assert len(sampled(rollout)) == 10 and rollout.finish_reason is FinishReason.LENGTH

    run(play())


def test_requests_at_once_share_the_budget_and_turns_and_contexts_are_limited() -> None:
    async def play() -> None:
        policy = Policy(smol(), lambda *_: "123456789", delay=0.01)
        async with episode(policy.generate, limits=Limits(12, 3, 60)) as (client, session):
            ask = lambda: client.chat.completions.create(model="m", messages=[USER])  # noqa: E731
            replies = await asyncio.gather(ask(), ask())
            assert sorted(reply.usage.completion_tokens for reply in replies) == [3, 9]
            assert len(sampled(session.rollout("g"))) == 12
        async with episode(policy.generate, limits=Limits(1000, 2, 60)) as (client, session):
            with pytest.raises(openai.BadRequestError, match=r"has \d+ tokens, and 60 fit"):
                await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "a " * 100}])
            for _ in range(2):
                await client.chat.completions.create(model="m", messages=[USER])
            with pytest.raises(openai.BadRequestError, match="has had its 2 requests"):
                await client.chat.completions.create(model="m", messages=[USER])
            assert session.requests == 2 and session.refused

    run(play())


def test_keys_are_of_one_episode_and_end_with_it() -> None:
    async def play() -> None:
        policy = Policy(smol(), answers("a", "b"))
        tokenizer = smol()
        async with Proxy(ChatML(tokenizer), tokenizer, model="tiny") as proxy:
            assert proxy.base_url.startswith("http://127.0.0.1:")
            async with proxy.session(PROMPT, policy.generate, SAMPLING, LIMITS) as session:
                client = AsyncOpenAI(base_url=proxy.base_url, api_key=session.key, max_retries=0)
                assert [model.id async for model in client.models.list()] == ["tiny"]
                assert (await client.models.retrieve("tiny")).id == "tiny"
                with pytest.raises(openai.AuthenticationError, match="belongs to no episode"):
                    await client.with_options(api_key="sk-no").models.list()
                policy.gate.clear()
                waiting = asyncio.create_task(client.chat.completions.create(model="m", messages=[USER]))
                while not policy.contexts:
                    await asyncio.sleep(0.01)
            # What is sampled when the episode ends is cancelled, and its client is told.
            with pytest.raises(openai.APIStatusError, match="has ended"):
                await waiting
            with pytest.raises(openai.APIStatusError, match="has ended") as error:
                await client.models.list()
            assert error.value.status_code == 410
            assert session.rollout("g").response_tokens == ()
            await client.close()

    run(play())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"response_format": {"type": "json_object"}}, "'response_format' cannot be followed"),
        ({"logit_bias": {"5": 1}}, "'logit_bias' cannot be followed"),
        ({"tool_choice": "required", "tools": [ADD]}, "a call cannot be forced"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "type 'custom' is not built in"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "type 'image_url': the policy reads text",
        ),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "unknown role 'wizard'"),
        ({"messages": []}, "at least one message"),
        ({"n": 0}, "'n' must be a whole number, from 1 to 128"),
        ({"max_tokens": 0}, "'max_tokens' must be a whole number, at least 1"),
        ({"stop": [""]}, "'stop' must be"),
    ],
)
def test_what_cannot_be_followed_is_refused_in_one_sentence(fields: dict[str, Any], message: str) -> None:
    async def play() -> None:
        async with episode(Policy(smol(), answers("x")).generate) as (client, session):
            with pytest.raises(openai.BadRequestError, match=message) as error:
                await client.chat.completions.create(**{"model": "m", "messages": [USER], **fields})
            assert error.value.type == "invalid_request_error" and error.value.body["message"].endswith(".")
            assert session.requests == 0

    run(play())


def test_the_sampling_is_the_runs_and_that_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    async def play() -> None:
        policy = Policy(smol(), answers("a", "b", "c"))
        async with episode(policy.generate) as (client, session):
            for temperature in (1.0, 0.0, 0.0):
                await client.chat.completions.create(model="m", messages=[USER], temperature=temperature, user="me")
            assert session.key not in caplog.text
        assert {(each.temperature, each.max_tokens) for each in policy.sampling} == {(1.0, 64)}

    with caplog.at_level(logging.WARNING):
        run(play())
    assert [record.getMessage() for record in caplog.records] == [
        "the agent asks for its own temperature: the run's sampling is used, as training must know it"
    ]


def test_a_failure_of_the_engine_is_an_error_and_known_to_the_session() -> None:
    async def play() -> None:
        async def broken(*_: object) -> Any:
            raise RuntimeError("engine 0 died")

        async with episode(broken) as (client, session):
            with pytest.raises(openai.InternalServerError, match="Generation failed"):
                await client.chat.completions.create(model="m", messages=[USER])
            assert str(session.failed.exception()) == "engine 0 died" and session.rollout("g").response_tokens == ()

    run(play())


def test_fifty_episodes_at_once_are_kept_apart() -> None:
    async def play() -> None:
        tokenizer = smol()

        async def one(proxy: Proxy, number: int) -> None:
            # Each policy answers with its own number, and each agent asks with it.
            policy = Policy(tokenizer, lambda context, turn: f"{number} {turn}<|im_end|>", delay=0.002 * (number % 7))
            async with proxy.session(PROMPT, policy.generate, SAMPLING, LIMITS) as session:
                async with AsyncOpenAI(base_url=proxy.base_url, api_key=session.key) as client:
                    messages: list[Any] = [{"role": "user", "content": f"I am {number}"}]
                    for turn in range(3):
                        reply = await client.chat.completions.create(model="m", messages=messages)
                        assert reply.choices[0].message.content == f"{number} {turn}"
                        messages += [reply.choices[0].message, {"role": "user", "content": "On"}]
                rollout = session.rollout(str(number))
            assert whole(rollout) == policy.contexts[-1] + policy.sampled[-1] and not rollout.forks
            assert sampled(rollout) == sum(policy.sampled, ())

        async with Proxy(ChatML(tokenizer), tokenizer) as proxy:
            await asyncio.gather(*(one(proxy, number) for number in range(50)))

    run(play())
