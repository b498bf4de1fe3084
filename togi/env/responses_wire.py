"""OpenAI's Responses interface: items to messages, answers to items, and the events of a stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import count

from togi.data.messages import ASSISTANT, SYSTEM, TOOL, USER, Message
from togi.env.openai_wire import (
    Answer,
    Ask,
    Body,
    Json,
    RequestError,
    conversation,
    event,
    functions,
    may_call,
    pieces,
    whole,
)


def read_responses(body: Body, template: str) -> Ask:
    """A request of the Responses interface. Raises RequestError."""
    text, instructions, previous = body.get("text"), body.get("instructions"), body.get("previous_response_id")
    wanted = text.get("format") if isinstance(text, Mapping) else None
    if wanted not in (None, {"type": "text"}):
        message = "'text.format' cannot be followed here: answers are not constrained; ask for the format in a message."
        raise RequestError(message, param="text.format", code="unsupported_parameter")
    if body.get("prompt") is not None:
        raise RequestError("'prompt' cannot be followed here: send its text as input.", param="prompt")
    if not isinstance(instructions, str | None) or not isinstance(previous, str | None):
        raise RequestError("'instructions' and 'previous_response_id' must be texts.")
    given = body.get("input")
    items = [{"role": USER, "content": given}] if isinstance(given, str) else given
    if not isinstance(items, list) or not all(isinstance(item, Mapping) for item in items):
        raise RequestError("'input' must be a text or a list of items.", param="input")
    if not items and previous is None:
        raise RequestError("'input' is empty.", param="input")
    tools = body.get("tools")
    return Ask(
        body,
        messages=conversation(_messages(items), template) if items else (),
        tools=functions([_nested(tool) for tool in tools] if isinstance(tools, list) else tools),
        head=({"role": SYSTEM, "content": instructions},) if instructions else (),
        previous=previous,
        max_tokens=whole(body, "max_output_tokens", 1),
        reads_calls=may_call(body),
    )


def _nested(tool: object) -> object:
    """A function of this interface in the form of the chat interface."""
    if not isinstance(tool, Mapping) or tool.get("type") != "function" or "function" in tool:
        return tool
    function = {name: tool[name] for name in ("name", "description", "parameters") if tool.get(name) is not None}
    return {"type": "function", "function": function}


def _messages(items: Sequence[Mapping[str, object]]) -> list[Json]:
    """Items as messages: reasoning, text and calls that follow each other are one assistant turn."""
    messages = list[Json]()
    turn: Json | None = None
    for item in items:
        kind = item.get("type") or ("message" if "role" in item else None)
        if kind == "function_call_output":
            messages.append({"role": TOOL, "tool_call_id": item.get("call_id"), "content": item.get("output")})
            turn = None
        elif kind == "message" and item.get("role") != ASSISTANT:
            messages.append({"role": item.get("role"), "content": item.get("content")})
            turn = None
        elif kind in ("message", "reasoning", "function_call"):
            # Reasoning begins a turn, text follows reasoning, calls follow all.
            opened = turn is not None and "tool_calls" not in turn and not turn["content"]
            if turn is None or not (kind == "function_call" or (kind == "message" and opened)):
                turn = {"role": ASSISTANT, "content": ""}
                messages.append(turn)
            turn |= _part(kind, item, turn)
        else:
            raise RequestError(f"An item of type {kind!r} cannot be read here: send messages and calls.", param="input")
    return messages


def _part(kind: str, item: Mapping[str, object], turn: Json) -> Json:
    """What an item adds to its turn."""
    if kind == "message":
        return {"content": item.get("content")}
    if kind == "reasoning":
        parts = item.get("content") or item.get("summary")
        texts = [part.get("text") for part in parts if isinstance(part, Mapping)] if isinstance(parts, list) else []
        return {"reasoning_content": "".join(map(str, texts))}
    function = {"name": item.get("name"), "arguments": item.get("arguments")}
    calls = turn.get("tool_calls")
    earlier = calls if isinstance(calls, list) else []
    return {"tool_calls": [*earlier, {"id": item.get("call_id"), "type": "function", "function": function}]}


def responses_reply(ask: Ask, answer: Answer) -> Json:
    """The body of an answer."""
    return _response(ask, answer, _items(answer))


def responses_events(ask: Ask, answer: Answer) -> Iterator[bytes]:
    """The stream of an answer: opened, each item with its parts, and the whole."""
    items, number = _items(answer), count()

    def said(kind: str, **fields: object) -> bytes:
        return event({"type": kind, "sequence_number": next(number), **fields}, kind)

    begun: Json = {**_response(ask, answer, []), "status": "in_progress", "incomplete_details": None, "usage": None}
    yield said("response.created", response=begun)
    yield said("response.in_progress", response=begun)
    for index, item in enumerate(items):
        place: Json = {"output_index": index, "item_id": item["id"]}
        yield said("response.output_item.added", output_index=index, item=_opened(item))
        match item:
            case {"type": "message", "content": [{"text": str(text)}]}:
                place |= {"content_index": 0}
                yield said("response.content_part.added", **place, part=_text_part(""))
                for piece in pieces(text):
                    yield said("response.output_text.delta", **place, delta=piece, logprobs=[])
                yield said("response.output_text.done", **place, text=text, logprobs=[])
                yield said("response.content_part.done", **place, part=_text_part(text))
            case {"type": "function_call", "arguments": str(text)}:
                for piece in pieces(text):
                    yield said("response.function_call_arguments.delta", **place, delta=piece)
                yield said("response.function_call_arguments.done", **place, name=item["name"], arguments=text)
            case {"type": "reasoning", "content": [{"text": str(text)}]}:
                place |= {"content_index": 0}
                for piece in pieces(text):
                    yield said("response.reasoning_text.delta", **place, delta=piece)
                yield said("response.reasoning_text.done", **place, text=text)
        yield said("response.output_item.done", output_index=index, item=item)
    whole_response = _response(ask, answer, items)
    yield said(f"response.{whole_response['status']}", response=whole_response)


def _items(answer: Answer) -> list[Json]:
    """The answer as items: reasoning, text, calls. There is at least one."""
    (choice,) = answer.choices
    message, items = choice.message, list[Json]()
    status = "incomplete" if choice.finish == "length" else "completed"
    reasoning, content, calls = message.get("reasoning_content"), message.get("content"), message.get("tool_calls", ())
    if reasoning:
        content_parts = [{"type": "reasoning_text", "text": reasoning}]
        items.append(
            {"id": f"rs_{answer.id}", "type": "reasoning", "summary": [], "content": content_parts, "status": status}
        )
    if content or not calls:
        opened = {"id": f"msg_{answer.id}", "type": "message", "role": ASSISTANT}
        items.append({**opened, "status": status, "content": [_text_part(content or "")]})
    for index, call in enumerate(calls):
        function = {"name": call["function"]["name"], "arguments": call["function"]["arguments"]}
        head = {"id": f"fc_{answer.id}_{index}", "type": "function_call", "call_id": call["id"]}
        items.append({**head, **function, "status": status})
    return items


def _text_part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _opened(item: Json) -> Json:
    """An item before its text."""
    empty: Json = {"function_call": {"arguments": ""}, "message": {"content": []}, "reasoning": {"content": []}}
    fields = empty[str(item["type"])]
    assert isinstance(fields, dict)
    return {**item, **fields, "status": "in_progress"}


def _response(ask: Ask, answer: Answer, items: Sequence[Message]) -> Json:
    body, cut = ask.body, answer.choices[0].finish == "length"
    usage = answer.usage()
    return {
        "id": f"resp_{answer.id}",
        "object": "response",
        "created_at": answer.created,
        "status": "incomplete" if cut else "completed",
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "instructions": body.get("instructions"),
        "metadata": body.get("metadata") or {},
        "model": ask.model,
        "output": list(items),
        "parallel_tool_calls": True,
        "previous_response_id": ask.previous,
        "temperature": body.get("temperature"),
        "top_p": body.get("top_p"),
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": body.get("tools") or [],
        "text": {"format": {"type": "text"}},
        "truncation": "disabled",
        "max_output_tokens": ask.max_tokens,
        "usage": {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        },
    }
