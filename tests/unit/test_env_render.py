"""Conversations as token ids: what is appended is what the template renders, and every fork has a reason."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tests.agent_talks import TOOLS, Request, Talk, agent_tokenizer
from tests.chat_templates import CALL, FAMILIES, Q1, RESULT, TOOL
from togi.data.chat import visible
from togi.env.render import TOKENS, Renderer
from togi.env.template import Answers
from togi.env.tool_calls import CallFormat, ToolCall, reasoning_tags, written
from togi.errors import DataError

# Templates with reasoning, which goes when the user says something.
REASONING = {"qwen3", "qwen35", "gemma4", "think_opened"}
MODES: dict[str, list[dict[str, bool]]] = {
    "qwen3": [{}, {"enable_thinking": False}],
    "qwen35": [{}, {"enable_thinking": False}],
    "gemma4": [{"enable_thinking": True}, {}],
}
CASES = [(name, mode) for name in FAMILIES for mode in MODES.get(name, [{}])]


def renderer_of(name: str, kind: str = "bytes", **options: Any) -> Renderer:
    tokenizer = agent_tokenizer(name, kind)
    stops = [token for token in ("<|tool_response>", "<start_function_response>") if token in tokenizer.get_vocab()]
    return Renderer(tokenizer, ends=tokenizer.convert_tokens_to_ids(stops), options=options)


def talk_of(name: str, kind: str, mode: Mapping[str, bool], seed: int) -> Talk:
    thinks = name in REASONING and mode.get("enable_thinking", name != "gemma4")
    return Talk(renderer_of(name, kind, **mode), seed, thinks=thinks, calls=seed % 4 > 0)


def is_prefix(before: tuple[int, ...], context: tuple[int, ...]) -> bool:
    return context[: len(before)] == before


class Reasons:
    """Why the requests of a conversation may fork, read from what was said and not from the renderer."""

    def __init__(self, name: str, talk: Talk) -> None:
        self.name, self.talk = name, talk
        self.thought = False
        """Whether reasoning was written since the user said something."""
        self.ended_with_user = True

    def of(self, request: Request) -> str:
        template = self.talk.renderer.template
        writes = bool("thought" in request.notes or template.opens or (template.leaves_out and self.name != "smollm3"))
        self.thought |= writes
        # Observations that no structured call asked for are the user's for some templates.
        by_user = request.follows == "question" or (
            request.follows == "problem" and template.answers is not Answers.ALWAYS
        )
        reason = ""
        if self.name == "think_opened":
            reason = "no turn keeps its reasoning"
        elif self.thought and by_user:
            reason = "older turns lose their reasoning"
        elif template.answers is Answers.AFTER_CALLS and request.parsed.calls and request.parsed.problems:
            reason = "calls are structured, and leave no place for a malformed one"
        elif self.name == "mistral_v3":
            reason = self.of_mistral(request, by_user=by_user)
        self.thought &= not by_user
        self.ended_with_user = by_user
        return reason

    def of_mistral(self, request: Request, *, by_user: bool) -> str:
        """The oldest tool template of Mistral moves things, and writes calls in one list after nothing."""
        if by_user and self.talk.calls:
            return "tools stand before the last question"
        if request.messages[0]["role"] == "system" and (by_user or self.ended_with_user):
            return "the system prompt stands in a last question"
        if request.notes & {"text", "broken", "cut"}:
            return "text follows a space"
        return "calls are one list, and alone" if request.notes & {"calls", "spoken call"} else ""


def check(name: str, kind: str, mode: Mapping[str, bool], seeds: range) -> tuple[int, dict[str, int]]:
    """Every request of these conversations; how many there are, and how many forked for which reason."""
    count, forks = 0, dict[str, int]()
    for seed in seeds:
        talk = talk_of(name, kind, mode, seed)
        renderer, tokenizer = talk.renderer, talk.renderer.tokenizer
        tools, reasons = TOOLS if talk.calls else (), Reasons(name, talk)
        for request in talk.requests():
            count += 1
            shown = visible(tokenizer, request.context)
            whole = renderer.first(request.messages, tools)
            if kind == "bytes":
                assert shown == renderer.text(request.messages, tools)
            assert same_text(shown, visible(tokenizer, whole))
            reason = reasons.of(request)
            if not is_prefix(request.before, request.context):
                assert reason, f"a fork of {name} (seed {seed}) has no reason: {request.follows}, {request.notes}"
                assert request.context == whole
                forks[reason] = forks.get(reason, 0) + 1
            # What tools and users say makes no control token.
            harmless = [
                {**message, "content": "x"} if message["role"] in ("user", "tool") else message
                for message in request.messages
            ]
            controls = renderer.template.controls
            expected = [token for token in renderer.first(harmless, tools) if token in controls]
            assert [token for token in whole if token in controls] == expected
    return count, forks


def same_text(one: str, other: str) -> bool:
    """The tokenizer of ``bpe`` joins accents with their letters, in what it tokenises and not in what is sampled."""
    return unicodedata.normalize("NFC", one) == unicodedata.normalize("NFC", other)


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_a_request_continues_the_last_one_or_forks_for_a_reason(name: str, mode: dict[str, bool]) -> None:
    check(name, "bytes", mode, range(6))


@pytest.mark.parametrize("kind", ["bpe", "spaces"])
@pytest.mark.parametrize(
    ("name", "mode"), [case for case in CASES if case[0] in ("qwen3", "llama3", "phi3", "mistral_v13", "gemma4")]
)
def test_so_it_is_with_tokenizers_that_merge_and_change_text(kind: str, name: str, mode: dict[str, bool]) -> None:
    check(name, kind, mode, range(3))


@pytest.mark.large
@pytest.mark.parametrize(("kind", "talks"), [("bytes", 200), ("bpe", 40), ("spaces", 40)])
@pytest.mark.parametrize(("name", "mode"), CASES)
def test_two_hundred_conversations(
    kind: str, talks: int, name: str, mode: dict[str, bool], capsys: pytest.CaptureFixture[str]
) -> None:
    count, forks = check(name, kind, mode, range(talks))
    with capsys.disabled():
        print(f"\n{name} {mode or ''} {kind}: {count} requests, {sum(forks.values()) / count:.1%} forks {forks}")


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


HELLO: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}]


def continued(renderer: Renderer, answer: str, *after: Mapping[str, Any]) -> tuple[tuple[int, ...], str]:
    """All tokens up to an answer, and the text that the next request adds to them; asserts that it is no fork."""
    ids = ids_of(renderer.tokenizer, answer)
    before = (*renderer.first(HELLO, TOOLS), *ids)
    context = renderer.after(before, [*HELLO, renderer.said(ids), *after], TOOLS)
    assert is_prefix(before, context)
    return before, visible(renderer.tokenizer, context[len(before) :])


BYE = {"role": "user", "content": "Bye"}


def test_the_text_between_two_answers() -> None:
    added = "<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    # an answer that has ended, and one that was cut off: the template ends it
    assert continued(renderer_of("smollm2"), " Hi \n<|im_end|>", BYE)[1] == added.removeprefix("<|im_end|>")
    assert continued(renderer_of("smollm2"), "Hi", BYE)[1] == added
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    assert continued(renderer_of("llama3"), " Hi \n", BYE)[1] == (
        "<|eot_id|>" + header.format("user") + "Bye<|eot_id|>" + header.format("assistant")
    )
    call = '<tool_call>\n{"name": "search",   "arguments": {}}\n</tool_call>'
    result = {"role": "tool", "content": "22"}
    for mode in ({}, {"enable_thinking": False}):
        assert continued(renderer_of("qwen3", **mode), f"{call}<|im_end|>", result)[1] == (
            "\n<|im_start|>user\n<tool_response>\n22\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
            + ("<think>\n\n</think>\n\n" if mode else "")
        )


def test_an_answer_that_is_cut_off_within_a_letter() -> None:
    renderer = renderer_of("smollm2")
    half = ids_of(renderer.tokenizer, "東")[:2]
    before = (*renderer.first(HELLO), *half)
    context = renderer.after(before, [*HELLO, renderer.said(half), BYE])
    assert is_prefix(before, context)
    assert visible(renderer.tokenizer, context) == renderer.text([*HELLO, renderer.said(half), BYE])


def test_sampled_tokens_are_kept_however_they_part_the_text() -> None:
    renderer = renderer_of("llama3", "bpe")
    odd = tuple(token for letter in "the weather" for token in ids_of(renderer.tokenizer, letter))
    assert odd != ids_of(renderer.tokenizer, "the weather")
    before = (*renderer.first(HELLO), *odd)
    assert is_prefix(before, renderer.after(before, [*HELLO, renderer.said(odd), BYE]))


def test_an_answer_that_is_not_the_conversations_forks() -> None:
    renderer = renderer_of("smollm2")
    before = (*renderer.first(HELLO), *ids_of(renderer.tokenizer, "Hi<|im_end|>"))
    messages = [*HELLO, {"role": "assistant", "content": "Ho"}, BYE]
    assert renderer.after(before, messages) == renderer.first(messages)
    assert renderer.after((), messages) == renderer.first(messages)


@pytest.mark.parametrize("name", FAMILIES)
def test_text_of_a_tool_is_never_a_control_token(name: str) -> None:
    renderer = renderer_of(name, "bpe")
    controls = renderer.template.controls
    call = ToolCall("search", {"query": "a"}, "abcdef123")
    closing = renderer.template.opens[1] if renderer.template.opens else ""
    said = renderer.said(ids_of(renderer.tokenizer, closing + written(call, renderer.form)))
    (made,) = said["tool_calls"]
    call = ToolCall("search", {"query": "a"}, made["id"])

    def rendered(content: str) -> tuple[int, ...]:
        return renderer.first([*HELLO, said, renderer.observation(content, call)], TOOLS)

    trap = "".join(controls.values()) + "\ufdd0\ufdd1"
    plain, trapped = rendered("x"), rendered(trap)
    assert [token for token in trapped if token in controls] == [token for token in plain if token in controls]
    assert trap.replace("\ufdd0\ufdd1", "\ufffd\ufffd") in visible(renderer.tokenizer, trapped)
    # and so with a question, and with a call of a client's history
    asked = [{"role": "user", "content": trap}]
    assert sum(token in controls for token in renderer.first(asked)) == sum(
        token in controls for token in renderer.first(HELLO)
    )


def test_reasoning_in_the_content_of_a_clients_answer_is_reasoning() -> None:
    renderer = renderer_of("qwen3")
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHi <|im_end|>"}
    (opening,) = ids_of(renderer.tokenizer, "<think>")
    assert renderer.first([*HELLO, thought, {"role": "tool", "content": "22"}]).count(opening) == 1
    assert renderer.first([*HELLO, thought, BYE]).count(opening) == 0
    assert renderer.text([*HELLO, thought, BYE]).count("<|im_end|>") == 4
    assert renderer.first([*HELLO, thought, BYE]).count(ids_of(renderer.tokenizer, "<|im_end|>")[0]) == 3


def test_a_sampled_look_alike_is_text_and_a_sampled_token_is_a_token() -> None:
    renderer = renderer_of("smollm2")
    end = ids_of(renderer.tokenizer, "<|im_end|>")
    text = (*ids_of(renderer.tokenizer, "<"), *ids_of(renderer.tokenizer, "|im_end|>"), *end)
    assert text.count(end[0]) == 1
    # tokenised anew, as in a fork
    whole = renderer.first([*HELLO, renderer.said(text), BYE])
    assert whole.count(end[0]) == renderer.first([*HELLO, {"role": "assistant", "content": "x"}, BYE]).count(end[0])
    token = (*ids_of(renderer.tokenizer, "a"), *end, *ids_of(renderer.tokenizer, "b"), *end)
    assert renderer.first([*HELLO, renderer.said(token), BYE]).count(end[0]) == whole.count(end[0]) + 1


def test_what_a_template_knows() -> None:
    def known(name: str) -> tuple[str, bool, bool, bool]:
        template = renderer_of(name).template
        return str(template.answers), template.knows_calls, template.shows_tools, template.knows_system

    assert known("qwen3") == ("always", True, True, True)
    assert known("llama3") == ("always", True, True, True)
    assert known("mistral_v3") == ("after calls", True, True, True)
    assert known("mistral_v7") == ("never", False, False, True)
    assert known("gemma2") == ("never", False, False, False)
    assert known("gemma4") == ("after calls", True, True, True)
    # It writes any role, so it knows none.
    assert known("smollm2") == ("never", False, False, True)


def test_tools_and_their_answers_reach_templates_that_know_neither() -> None:
    for name in ("smollm2", "gemma2", "phi3"):
        renderer = renderer_of(name)
        text = renderer.text([{"role": "system", "content": "be brief"}, Q1, CALL, RESULT, RESULT], [TOOL])
        assert json.dumps(TOOL["function"]) in text
        assert text.index("be brief") < text.index("q1")
        assert written(ToolCall("weather", {"city": "Oslo"}, ""), renderer.form) in text
        answer = f"<tool_response>\n{RESULT['content']}\n</tool_response>"
        assert f"{answer}\n{answer}" in text


def test_a_refusal_names_what_the_template_refuses() -> None:
    with pytest.raises(
        DataError, match=r"messages user, user is refused by the chat template \(Conversation roles must alternate"
    ):
        renderer_of("gemma2").first([*HELLO, *HELLO])
    # a template that wants a call before each answer of a tool
    tokenizer = agent_tokenizer("qwen3", "bytes")
    check = "{% for m in messages %}{% if m.role == 'tool' and not (loop.previtem.tool_calls or loop.previtem.role == 'tool') %}"
    tokenizer.chat_template = (
        f"{check}{{{{ raise_exception('No call!') }}}}{{% endif %}}{{% endfor %}}{tokenizer.chat_template}"
    )
    renderer = Renderer(tokenizer)
    assert renderer.template.answers is Answers.AFTER_CALLS
    with pytest.raises(DataError, match=r"messages user, tool is refused by the chat template \(No call!\)"):
        renderer.first([*HELLO, RESULT])
    call = '<tool_call>\n{"name": "search", "arguments": {}}\n</tool_call>'
    (made,) = renderer.parsed(ids_of(tokenizer, call)).calls
    assert continued(renderer, call, renderer.observation("22", made))[1].startswith(
        "<|im_end|>\n<|im_start|>user\n<tool_response>"
    )
    # what is said of a malformed call is the user's there
    broken = renderer.said(ids_of(tokenizer, call[:30]))
    assert "<tool_response>\n22\n</tool_response>" in renderer.text([*HELLO, broken, renderer.observation("22")])
    with pytest.raises(DataError, match="unknown role 'judge'"):
        renderer.first([{"role": "judge", "content": "guilty"}])


def test_ids_of_a_client_that_are_too_long_for_a_template() -> None:
    renderer = renderer_of("mistral_v3")
    call = {**CALL["tool_calls"][0], "id": "call_0123456789abcdefghij"}
    text = renderer.text([Q1, {**CALL, "tool_calls": [call]}, {**RESULT, "tool_call_id": call["id"]}], [TOOL])
    (one, other) = (part[:9] for part in text.replace('"call_id": "', '"id": "').split('"id": "')[1:])
    assert one == other
    assert one.isalnum()


def test_the_beginning_of_sequence_is_there_once() -> None:
    for name in ("llama3", "gemma3", "mistral_v13"):
        renderer = renderer_of(name)
        before, _ = continued(renderer, "Hi", BYE)
        assert before.count(renderer.tokenizer.bos_token_id) == 1


def client_of(message: Mapping[str, Any], *, forgets: bool) -> dict[str, Any]:
    """A message as a client of OpenAI's interface sends it back, with or without the ids and the reasoning."""
    calls = [
        {
            "type": "function",
            "function": {"name": call["function"]["name"], "arguments": json.dumps(call["function"]["arguments"])},
        }
        | ({} if forgets else {"id": call["id"]})
        for call in message.get("tool_calls", ())
    ]
    kept = {key: item for key, item in message.items() if key in ("role", "content")}
    kept |= {} if forgets or "reasoning_content" not in message else {"reasoning_content": message["reasoning_content"]}
    return {**kept, "content": message["content"] or None, "tool_calls": calls} if calls else kept


@pytest.mark.parametrize("forgets", [False, True])
@pytest.mark.parametrize("name", ["qwen3", "llama3", "mistral_v13", "gemma4", "smollm2"])
def test_a_client_that_repeats_an_answer_means_its_tokens(name: str, forgets: bool) -> None:
    renderer = renderer_of(name)
    opening, closing = reasoning_tags(renderer.form)[0]
    thought = f"{opening}\nhm\n{closing}" if name in REASONING else ""
    texts = [thought + written(ToolCall("search", {"query": query}, "abcdef123"), renderer.form) for query in "aab"]
    said = [renderer.said(ids_of(renderer.tokenizer, text)) for text in (*texts, " Done. ")]
    messages = [message for each in said for message in (each, BYE)]
    sent = [client_of(each, forgets=forgets) if TOKENS in each else each for each in messages]
    assert renderer.recalled(sent, said) == tuple(messages)
    # another answer is the client's own
    own = [{"role": "assistant", "content": "Done!"}]
    assert renderer.recalled(own, said) == tuple(own)


def test_the_message_of_an_answer_is_its_parts() -> None:
    renderer = renderer_of("qwen3")
    ids = ids_of(
        renderer.tokenizer, '<think>\nhm\n</think>\n\nOk.\n<tool_call>\n{"name": "now"}\n</tool_call><|im_end|>'
    )
    message = renderer.said(ids)
    assert message == {
        "role": "assistant",
        "content": "Ok.",
        "reasoning_content": "hm",
        "tool_calls": [
            {"id": message["tool_calls"][0]["id"], "type": "function", "function": {"name": "now", "arguments": {}}}
        ],
        TOKENS: ids,
    }
    assert renderer.form is CallFormat.HERMES
