"""Rows from the wild: dialects of conversations, tools, parts, text in place of lists, prompts that are there twice.

Learned parts are in brackets; every text is written by hand. Faults are compared as whole sentences.
"""

import json

import datasets
import pytest

from tests.records import parts
from tests.tiny import CHAT_TEMPLATE, STOP, tiny_tokenizer
from togi.data.chat import closing_token, end_notice, enders, stop_token_ids
from togi.data.prompts import PromptSpec, load_prompts
from togi.data.records import RecordSpec, load_pairs, load_sft, load_unpaired
from togi.data.rows import read_outputs
from togi.data.source import load_mixture
from togi.errors import DataError
from togi.run.iterate_steps import _asked, _shown

TOOL_TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FIND = {"name": "find", "description": "Find it.", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": FIND}]
SHOWN_TOOLS = (
    '<tools>[{"type": "function", "function": {"name": "find", "description": "Find it.", '
    '"parameters": {"type": "object", "properties": {}}}}]</tools>\n'
)
CALL = {"type": "function", "function": {"name": "find", "arguments": {"color": "red"}}}
HEAD = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
QA = HEAD + "[a<|im_end|>]"
USER = {"role": "user", "content": "q"}
SCORED = RecordSpec("", input_key="m", output_key="o", apply_chat_template=True, max_len=400)
ANSWER = {"role": "assistant", "content": "a"}
CALLED = [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "here"}, ANSWER]
CALLED_TEXT = (
    HEAD + '[<call>find {"color": "red"}</call><|im_end|>]\n<|im_start|>tool\nhere<|im_end|>\n<|im_start|>assistant\n'
    "[a<|im_end|>]"
)


def chatting(template=CHAT_TEMPLATE):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def write(tmp_path, rows, name="a.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sft(tmp_path, rows, template=CHAT_TEMPLATE, path=None, **settings):
    settings = {"input_key": "m", "apply_chat_template": True, "multiturn": True, **settings}
    return load_sft(RecordSpec(path or write(tmp_path, rows), **settings), chatting(template))


def learned(examples):
    ((sample,),) = examples
    return parts(sample, tiny_tokenizer())


def warnings(examples):
    return [warning for warning in examples.report.warnings if "starts plain text" not in warning]


def asked(tmp_path, rows, template=CHAT_TEMPLATE, **settings):
    settings = {"input_key": "m", "apply_chat_template": True, **settings}
    return load_prompts(PromptSpec(write(tmp_path, rows), **settings), chatting(template))


@pytest.mark.parametrize(
    ("content", "template", "noted"),
    [
        ("a<|im_end|>\n<|im_start|>user\nmore", CHAT_TEMPLATE, True),
        ("a <|im_end|", CHAT_TEMPLATE, False),
        ("a<|im_end|>", "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}", False),
        ("a<|im_end|>", "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}", True),
    ],
)
def test_control_tokens_in_a_content_are_noted(tmp_path, content, template, noted):
    """Only those that the template itself writes: other special tokens may be part of the task."""
    plain, held = [USER, ANSWER], [{"role": "user", "content": content}, ANSWER]
    prompts = asked(tmp_path, [{"m": held[:1]}], template)
    assert ["itself writes" in warning for warning in warnings(prompts)] == [True] * noted
    found = warnings(sft(tmp_path, [{"m": plain}, {"m": held}], template))
    assert [warning.startswith("1 of 2 rows have content with special tokens") for warning in found] == [True] * noted


def fault(tmp_path, row, template=CHAT_TEMPLATE, loader=sft, **settings):
    """The sentence for a row, without the place of its field and what follows."""
    with pytest.raises(DataError) as caught:
        loader(tmp_path, [row], template, **settings)
    start = f"Line 1 of {tmp_path}/a.jsonl"
    text = str(caught.value)
    assert text.startswith(start)
    return text.removeprefix(start).partition(" (the first of 1 faulty rows")[0].removeprefix(": the field 'm' ")


DIALECTS = {
    "openai": ([USER, ANSWER], None),
    "sharegpt": ([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "from and value"),
    "sharegpt filled": (
        [{"from": "user", "value": "q", "role": None, "content": None}, {"from": "assistant", "value": "a"}],
        "from and value",
    ),
    "capital": ([{"role": "User", "content": "q"}, {"role": " Assistant", "content": "a"}], "another name"),
    "model": ([USER, {"role": "model", "content": "a"}], "another name"),
    "oasst": ([{"role": "prompter", "content": "q"}, ANSWER], "another name"),
    "json text": (json.dumps([USER, ANSWER]), "hold messages or tools as text"),
    "python text": (str([USER, ANSWER]), "hold messages or tools as text"),
    "numpy text": (
        "array([{'content': 'q', 'role': 'user'}\n {'content': 'a', 'role': 'assistant'}], dtype=object)",
        "hold messages or tools as text",
    ),
    "text of a text": (json.dumps(json.dumps([USER, ANSWER])), "hold messages or tools as text"),
    "half sharegpt": ([{"from": "user", "content": "q"}, {"role": "assistant", "value": "a"}], "from and value"),
    "one part": ([{"role": "user", "content": {"type": "text", "text": "q"}}, ANSWER], "in parts of text"),
    "columns": ({"role": ["user", "assistant"], "content": ["q", "a"]}, "columns of messages"),
    "parts": ([{"role": "user", "content": [{"type": "text", "text": "q"}]}, ANSWER], "in parts of text"),
    "bare parts": ([USER, {"role": "assistant", "content": [{"text": "a", "image": None}]}], "in parts of text"),
    "strings": ([{"role": "user", "content": ["q"]}, ANSWER], "in parts of text"),
}


@pytest.mark.parametrize("name", DIALECTS)
def test_dialects_are_read_as_one_form_and_said(tmp_path, name):
    value, said = DIALECTS[name]
    examples = sft(tmp_path, [{"m": value}])
    assert learned(examples) == QA
    assert bool(warnings(examples)) == (said is not None)
    assert said is None or any(said in text for text in warnings(examples))
    assert all(text.startswith("1 of 1 rows ") for text in warnings(examples))


def test_a_prompt_or_an_answer_may_be_one_message_or_parts(tmp_path):
    for prompt in ("q", USER, [USER], json.dumps([USER]), [{"type": "text", "text": "q"}]):
        for answer in ("a", ANSWER, [ANSWER], {"role": "gpt", "content": "a"}, json.dumps(ANSWER)):
            assert learned(sft(tmp_path, [{"m": prompt, "o": answer}], output_key="o")) == QA


def test_text_that_only_looks_like_messages_stays_text(tmp_path):
    for text in (
        '{"name": "Tom", "description": "a boy"}',
        "[1, 2]",
        "[]",
        '{"role": "king"}',
        "[x for x in y]",
        "{a: 1}",
        '{"content": "hello"} -- translate it',
        '{"type": "object", "properties": {...}} Explain this.',
        '[{"role": "admin"}, ...] Which roles are in this list?',
        '[{"role": "admin", "content": ...}] What is wrong here?',
    ):
        (prompt,) = asked(tmp_path, [{"m": text}])
        assert prompt.text == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("form", ["list", "text", "flat", "one", "list of texts"])
def test_tools_reach_the_template(tmp_path, form):
    tools = {
        "list": TOOLS,
        "text": json.dumps(TOOLS),
        "flat": [FIND],
        "one": TOOLS[0],
        "list of texts": [json.dumps(TOOLS[0])],
    }[form]
    assert learned(sft(tmp_path, [{"m": CALLED, "tools": tools}], TOOL_TEMPLATE)) == SHOWN_TOOLS + CALLED_TEXT


def test_tools_reach_the_template_in_every_command(tmp_path):
    chat, tokenizer = {"apply_chat_template": True}, chatting(TOOL_TEMPLATE)
    whole = SHOWN_TOOLS + QA
    row = {"p": [USER], "chosen": "a", "rejected": ANSWER | {"content": "b"}, "tools": TOOLS}
    ((chosen, rejected),) = load_pairs(RecordSpec(write(tmp_path, [row]), prompt_key="p", **chat), tokenizer)
    assert parts(chosen, tokenizer) == whole
    assert parts(rejected, tokenizer) == whole.replace("[a", "[b")
    row = {"m": "q", "o": "a", "label": True, "tools": TOOLS}
    path = write(tmp_path, [row])
    ((sample,),) = load_unpaired(RecordSpec(path, input_key="m", output_key="o", **chat), tokenizer)
    assert parts(sample, tokenizer) == whole
    (prompt,) = load_prompts(PromptSpec(path, "m", **chat), tokenizer)
    assert prompt.text == SHOWN_TOOLS + HEAD
    _, (ids,) = read_outputs(load_mixture(path, None), SCORED, tokenizer)
    assert ids == sample.tokens.tolist()


@pytest.mark.parametrize("none", [None, [], "", "[]", "null"])
def test_no_tools_are_no_tools(tmp_path, none):
    examples = sft(tmp_path, [{"m": CALLED, "tools": none}], TOOL_TEMPLATE)
    assert (learned(examples), warnings(examples)) == (CALLED_TEXT, [])


@pytest.mark.parametrize(
    "call",
    [
        {"type": "function", "function": {"name": "find", "arguments": '{"color": "red"}'}},
        {"function": {"name": "find", "arguments": {"color": "red"}}},
        {"name": "find", "arguments": '{"color": "red"}'},
        json.dumps({"name": "find", "arguments": {"color": "red"}}),
    ],
)
def test_calls_in_every_form(tmp_path, call):
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}, *CALLED[2:]]
    assert learned(sft(tmp_path, [{"m": messages}], TOOL_TEMPLATE)) == CALLED_TEXT
    old = [USER, {"role": "assistant", "content": None, "function_call": call}, *CALLED[2:]]
    if not isinstance(call, str):
        assert learned(sft(tmp_path, [{"m": old}], TOOL_TEMPLATE)) == CALLED_TEXT


def test_calls_and_answers_of_tools_as_turns_of_their_own(tmp_path):
    call = json.dumps({"name": "find", "arguments": {"color": "red"}})
    names = [("human", "q"), ("function_call", call), ("observation", "here"), ("gpt", "a")]
    rows = [{"m": [{"from": role, "value": value} for role, value in names]}]
    assert learned(sft(tmp_path, rows, TOOL_TEMPLATE)) == CALLED_TEXT
    # A template with a name of its own for them is asked by that name.
    own = TOOL_TEMPLATE.replace("{{ m.content }}", "{% if m.role == 'observation' %}{% endif %}{{ m.content }}")
    assert "<|im_start|>observation\nhere" in learned(sft(tmp_path, rows, own))


def test_keys_that_a_table_fills_are_not_there(tmp_path):
    other = {
        "name": "walk",
        "description": "Walk.",
        "parameters": {"type": "object", "properties": {"to": {"type": "a"}}},
    }
    walk = {"type": "function", "function": {"name": "walk", "arguments": {"to": "it"}}}
    rows = [
        {"m": CALLED, "tools": TOOLS, "label": {"x": None, "y": 1}},
        {"m": [USER, {"role": "assistant", "tool_calls": [walk]}], "tools": [{"type": "function", "function": other}]},
    ]
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_list(rows).to_parquet(path)
    (first,), (second,) = sft(tmp_path, [], TOOL_TEMPLATE, str(path))
    assert parts(first, tiny_tokenizer()) == SHOWN_TOOLS + CALLED_TEXT
    assert '[<call>walk {"to": "it"}</call><|im_end|>]' in parts(second, tiny_tokenizer())
    assert '{"to": {"type": "a"}}' in parts(second, tiny_tokenizer())
    # What a reward is given stays as the table has it.
    prompts = load_prompts(PromptSpec(str(path), "m", "label", apply_chat_template=True), chatting(TOOL_TEMPLATE))
    assert prompts[0].label == {"x": None, "y": 1}
    # In JSON a null is what somebody wrote.
    null = [USER, {"role": "assistant", "tool_calls": [{"name": "find", "arguments": {"color": None}}]}]
    assert '[<call>find {"color": null}</call>' in learned(sft(tmp_path, [{"m": null}], TOOL_TEMPLATE))


def test_what_the_template_leaves_out_is_said_once(tmp_path):
    thinking = {**ANSWER, "reasoning_content": "why"}
    rows = [{"m": [USER, thinking], "tools": TOOLS}, {"m": [USER, ANSWER], "tools": TOOLS}]
    examples = sft(tmp_path, rows)
    assert warnings(examples) == [
        "2 of 2 rows have tools that the chat template does not show to the model: use a template that renders tools.",
        "1 of 2 rows have reasoning beside the content that the chat template leaves out, so that it is not learned.",
    ]
    assert warnings(asked(tmp_path, [{"m": [USER], "tools": TOOLS}])) == [
        warnings(examples)[0].replace("2 of 2", "1 of 1")
    ]
    deaf = CHAT_TEMPLATE.replace("{{ message['content'] }}", "{{ message['content'] if message['role'] != 'system' }}")
    system = {"role": "system", "content": "Be kind."}
    lost = [
        "1 of 1 rows have a message in the context that the chat template leaves out or changes: look at the rendered examples."
    ]
    assert warnings(sft(tmp_path, [{"m": [system, USER, ANSWER]}], deaf)) == lost
    assert warnings(asked(tmp_path, [{"m": [system, USER]}], deaf)) == lost


def test_reasoning_is_learned_where_it_is_rendered(tmp_path):
    template = CHAT_TEMPLATE.replace(
        "{{ message['content'] }}",
        "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}{{ message['content'] }}",
    )
    for content in ({"content": "a"}, {"content": ""}, {"content": None}, {}):
        answer = {"role": "assistant", "reasoning_content": "why", **content}
        examples = sft(tmp_path, [{"m": [USER, answer]}], template)
        assert learned(examples) == HEAD + f"[<think>why</think>{content.get('content') or ''}<|im_end|>]"
        assert warnings(examples) == []


PROMPT_TWICE = [
    ("q", [USER, ANSWER]),
    (" q\n", [USER, ANSWER]),
    ([USER], [USER, ANSWER]),
    (USER, json.dumps([USER, ANSWER])),
]


@pytest.mark.parametrize(("prompt", "answer"), PROMPT_TWICE)
def test_a_prompt_that_is_there_twice_is_used_once(tmp_path, prompt, answer):
    examples = sft(tmp_path, [{"m": prompt, "o": answer}], output_key="o", multiturn=False)
    assert learned(examples) == QA
    assert any("1 of 1 rows repeat the prompt in the conversation of the answer" in text for text in warnings(examples))


def test_the_system_turn_of_a_prompt_that_is_there_twice(tmp_path):
    system = {"role": "system", "content": "s"}
    text = "<|im_start|>system\ns<|im_end|>\n" + QA
    for prompt, answer in (
        ("q", [system, USER, ANSWER]),
        ([system, USER], [USER, ANSWER]),
        ([system, USER], [system, USER, ANSWER]),
        ([system], [USER, ANSWER]),
        ([system], [system, USER, ANSWER]),
    ):
        rows = [{"m": prompt, "o": answer}]
        assert learned(sft(tmp_path, rows, output_key="o", multiturn=False)) == text
        pair = {"p": prompt, "chosen": answer, "rejected": [*answer[:-1], {**ANSWER, "content": "b"}]}
        spec = RecordSpec(write(tmp_path, [pair]), prompt_key="p", apply_chat_template=True)
        ((chosen, rejected),) = load_pairs(spec, chatting())
        assert parts(chosen, tiny_tokenizer()) == text
        assert parts(rejected, tiny_tokenizer()) == text.replace("[a", "[b")
        # 5 special tokens, "system\ns", "user\nq", two line breaks and "assistant\n".
        assert chosen.prompt_length == rejected.prompt_length == 5 + 8 + 6 + 2 + 10


def test_plain_prompts_that_begin_the_answer_are_said(tmp_path):
    prompt = "Tell a story about Tom."
    examples = sft(
        tmp_path, [{"m": prompt, "o": f"{prompt} He"}], output_key="o", apply_chat_template=False, multiturn=False
    )
    assert warnings(examples) == [
        "1 of 1 rows have an answer that begins with the whole prompt: if it is there twice, leave it out of one field."
    ]


def test_words_for_missing_values_are_said(tmp_path):
    for word in ("nan", " None ", "null"):
        rows = [{"m": "q", "o": word}, {"m": "q", "o": "banana"}]
        for chat in (False, True):
            examples = sft(tmp_path, rows, output_key="o", apply_chat_template=chat, multiturn=False)
            assert warnings(examples) == [
                "1 of 2 rows have an answer or a prompt that says nan, None or null: if that stands for a missing value, remove "
                "the row."
            ]


def test_a_string_stays_one_where_the_tools_are_text(tmp_path):
    told = fault(tmp_path, {"m": "q", "tools": json.dumps(TOOLS)}, TOOL_TEMPLATE)
    assert told.startswith("is a string, but without --output_key it must be a list of messages")


def test_messages_as_text_need_the_chat_template(tmp_path):
    told = fault(tmp_path, {"m": str([USER]), "o": "a"}, output_key="o", apply_chat_template=False, multiturn=False)
    assert told == "is a list of messages, as text (\"[{'role': 'user', 'content': 'q'}]\"): use --apply_chat_template"


def test_prompts_do_not_hold_their_answer(tmp_path):
    for rows in (
        [{"m": [USER, ANSWER]}],
        [{"m": [USER, ANSWER, ANSWER]}],
        [{"m": json.dumps([USER, {"role": "gpt", "content": "a"}])}],
    ):
        prompts = asked(tmp_path, rows)
        assert [prompt.text for prompt in prompts] == [HEAD]
        assert "1 of 1 rows end with the assistant's answer, which is left out of the prompt." in warnings(prompts)
    kept = asked(tmp_path, [{"m": [USER, ANSWER, USER]}])
    assert (kept[0].text, warnings(kept)) == (QA.replace("[", "").replace("]", "") + "\n" + HEAD, [])
    alone = fault(tmp_path, {"m": [ANSWER]}, loader=asked)
    assert alone == "holds nothing but the assistant's answer: put the question before it."


WRITE = "write {'role': 'user', 'content': ...}."
CALL_FORM = "write a list of {'type': 'function', 'function': {'name': ..., 'arguments': {...}}}."
TOOL_FORM = (
    "but the field 'tools' goes to the chat template: write a list of {'type': 'function', 'function': {'name': ..., "
    "'description': ..., 'parameters': ...}}, or rename the field if it means something else."
)
FAULTS = {
    "unknown role": (
        [USER, {"role": "asistant", "content": "a"}],
        "has the unknown role 'asistant' in its message 1: write system, user, assistant or tool, or use a chat template that "
        "names this role",
    ),
    "other keys": (
        [{"speaker": "user", "words": "q"}, ANSWER],
        f"has no role and content in its message 0 (its keys: 'speaker', 'words'): {WRITE}"[:-1],
    ),
    "no content": ([{"role": "user"}, ANSWER], f"has no content in its message 0 (its keys: 'role'): {WRITE}"[:-1]),
    "null": (
        [{"role": "user", "content": None}, ANSWER],
        "has content that is null in its message 0 (role user): it must be a string, correct or remove the row",
    ),
    "number": (
        [USER, {"role": "assistant", "content": 7}],
        "has content that is the number 7 in its message 1 (role assistant): it must be a string, correct or remove the row",
    ),
    "object": (
        [USER, {"role": "tool", "content": {"t": 20}}, ANSWER],
        "has content that is the object {'t': 20} in its message 1 (role tool): it must be a string, correct or remove the row",
    ),
    "true": (
        [USER, {"role": "assistant", "content": True}],
        "has content that is the bool True in its message 1 (role assistant): it must be a string, correct or remove the row",
    ),
    "image": (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ANSWER],
        "has a part of type 'image_url' in the content in its message 0: only text can be trained on, as {'type': 'text', 'text': "
        "...}",
    ),
    "part without text": (
        [{"role": "user", "content": [{"type": "text", "txt": "q"}]}, ANSWER],
        "has a part with the keys 'type', 'txt' in the content in its message 0: only text can be trained on, as {'type': 'text', "
        "'text': ...}",
    ),
    "reasoning": (
        [USER, {**ANSWER, "reasoning_content": 5}],
        "has reasoning_content that is the number 5 in its message 1 (role assistant): it must be a string, correct or remove the "
        "row",
    ),
    "arguments": (
        [USER, {"role": "assistant", "tool_calls": [{"name": "find", "arguments": "{color: red"}]}],
        "has arguments that are not JSON ('{color: red') in its message 1 (call 0): correct or remove the row",
    ),
    "arguments of a kind": (
        [USER, {"role": "assistant", "tool_calls": [{"name": "find", "arguments": "[1]"}]}],
        f"has arguments of type list in its message 1 (call 0): {CALL_FORM}"[:-1],
    ),
    "call": (
        [USER, {"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}],
        f"has a tool call without the name of a function in its message 1 (call 0): {CALL_FORM}"[:-1],
    ),
    "calls": (
        [USER, {"role": "assistant", "tool_calls": 3}],
        f"has tool_calls of type int in its message 1: {CALL_FORM}"[:-1],
    ),
    "call turn": (
        [USER, {"role": "tool_call", "content": "find red"}],
        "has the role 'tool_call' in its message 1, but its content is not a call ('find red'): write {'name': ..., 'arguments': "
        "{...}} as JSON",
    ),
    "broken text": (
        "[{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': a}]",
        "is a text that looks like a list of messages but is not JSON (\"[{'role': 'user', 'content': 'q'}, {'role': 'assistant', "
        "'co...\"): write the list itself, or as JSON",
    ),
    "string": (
        "q",
        "is a string, but without --output_key it must be a list of messages that ends with the answer: set --output_key, or give "
        "the list",
    ),
    "only reasoning": (
        [USER, {"role": "assistant", "reasoning_content": "why"}],
        " has nothing but reasoning in its message 1, which the chat template leaves out: use a template that renders "
        "reasoning_content, or put the text into content",
    ),
    "calls left out": (
        CALLED,
        " has tool calls in its message 1 that the chat template leaves out: use a template that renders tool_calls",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_named_for_what_they_are(tmp_path, name):
    value, sentence = FAULTS[name]
    assert fault(tmp_path, {"m": value}) == sentence


@pytest.mark.parametrize(
    ("tools", "sentence"),
    [
        (["hammer"], f"has the entry 0 'hammer', {TOOL_FORM}"),
        ("hammer", f"is 'hammer', {TOOL_FORM}"),
        ([{"type": "function"}], f"has the entry 0 {{'type': 'function'}}, {TOOL_FORM}"),
        (3, f"is 3, {TOOL_FORM}"),
    ],
)
def test_a_field_tools_that_is_something_else(tmp_path, tools, sentence):
    assert fault(tmp_path, {"m": [USER, ANSWER], "tools": tools}) == f": the field 'tools' {sentence}"[:-1]
    assert fault(tmp_path, {"m": [USER], "tools": tools}, loader=asked).startswith(
        f": the field 'tools' {sentence}"[:-1]
    )


def test_prompt_and_answer_that_do_not_fit(tmp_path):
    def said(prompt, answer):
        return fault(tmp_path, {"m": prompt, "o": answer}, output_key="o")

    other = {"role": "user", "content": "r"}
    assert said("r", [USER, ANSWER]) == (
        ": the conversation in 'o' does not begin with the prompt in 'm': let both have the same turns, or give only one of the "
        "two fields"
    )
    system = [{"role": "system", "content": text} for text in "st"]
    assert said([system[0], USER], [system[1], USER, ANSWER]) == (
        ": the fields 'm' and 'o' begin with different system turns: leave one of them out"
    )
    assert said("q", [system[0], ANSWER]) == (
        ": the field 'o' begins with a system turn behind the prompt in 'm': put it at the beginning of the prompt"
    )
    assert said([USER, ANSWER], "a") == (
        ": the prompt in 'm' ends with a turn of the assistant, and the answer in 'o' would follow it: end the prompt with the "
        "turn that is answered"
    )
    # After the assistant's turn an answer may go on with the next question.
    both = sft(tmp_path, [{"m": [USER, ANSWER], "o": [other, ANSWER]}], output_key="o", multiturn=False)
    assert learned(both) == QA.replace("[", "").replace("]", "") + "\n" + HEAD.replace("q", "r") + "[a<|im_end|>]"


def test_half_characters_are_found_when_rows_are_read(tmp_path):
    half = {"m": "fine", "label": {"any": ["x", "A \ud83d."]}}
    assert fault(tmp_path, half, loader=asked, label_key="label") == (
        ": the field 'label' has half a character (\\ud83d) in its text: correct or remove the row."
    )
    assert fault(tmp_path, {"m": "A \ud83d."}, loader=asked) == (
        ": the field 'm' has half a character (\\ud83d) in its text: correct or remove the row."
    ).replace(": the field 'm' ", "")
    broken = json.loads(json.dumps(TOOLS).replace("Find it.", "\\ud83d"))
    row = {"m": [USER, ANSWER], "tools": broken}
    assert (
        fault(tmp_path, row, TOOL_TEMPLATE) == " has half a character (\\ud83d) in its text: correct or remove the row"
    )
    path = write(tmp_path, [{"m": "q", "o": "A \ud83d."}])
    with pytest.raises(DataError, match=r"^Line 1 of .* has half a character \(\\ud83d\) in its text"):
        read_outputs(load_mixture(path, None), SCORED, chatting())


def test_the_token_that_closes_a_turn_ends_answers(tmp_path):
    tokenizer = chatting()
    assert (closing_token(tokenizer), end_notice(tokenizer, str(tmp_path), [STOP])) == (STOP, "")
    tokenizer.eos_token = "<|endoftext|>"
    assert stop_token_ids(tokenizer, str(tmp_path), chat=True) == (256, STOP)
    assert stop_token_ids(tokenizer, str(tmp_path), chat=False) == (256,)
    assert end_notice(tokenizer, str(tmp_path), [STOP, 256]) == (
        f"answers end with '<|im_end|>', which is no end token in the files of {tmp_path}: generation stops there too, and the "
        "saved model names it in its generation_config.json"
    )
    # A template that wants a system turn is given one.
    tokenizer.chat_template = (
        "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}" + CHAT_TEMPLATE
    )
    assert closing_token(tokenizer) == STOP
    # Text that is no token of its own ends nothing, and a template that cannot be asked is not.
    for template in (CHAT_TEMPLATE.replace("<|im_end|>", "###"), "{{ raise_exception('no') }}"):
        tokenizer.chat_template = template
        assert closing_token(tokenizer) is None


def test_every_end_that_the_rows_teach_is_found(tmp_path):
    """Calls may end with a token of their own, which only the rows show."""
    own = "{% endfor %}{{ '<|endoftext|>' if m.tool_calls else '<|im_end|>' }}"
    template = TOOL_TEMPLATE.replace("{% endfor %}<|im_end|>", own)
    assert sft(tmp_path, [{"m": CALLED}], template).last_tokens() == {256, STOP}
    assert sft(tmp_path, [{"m": [USER, ANSWER]}], template).last_tokens() == {STOP}
    assert enders(tiny_tokenizer(), {5, 256, 257, STOP}) == {256, STOP}  # a byte ends nothing, and 257 is BOS


def test_templates_that_know_content_in_parts_only(tmp_path):
    """As those of models that also see images: a text would be walked through letter by letter, and nothing rendered."""
    text = "{% for p in message.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
    parts_only = CHAT_TEMPLATE.replace("{{ message['content'] }}", text)
    assert learned(sft(tmp_path, [{"m": [USER, ANSWER]}], parts_only)) == QA
    (prompt,) = asked(tmp_path, [{"m": "q"}], parts_only)
    assert prompt.text == HEAD
    assert closing_token(chatting(parts_only)) == STOP
    deaf = CHAT_TEMPLATE.replace("{{ message['content'] }}", "")
    assert fault(tmp_path, {"m": "q"}, deaf, asked) == (
        "has its last message left out or changed by the chat template (it says 'q'): use a template that keeps what is asked."
    )


OLD_CALL = {"name": "find", "arguments": '{"color": "red"}'}


@pytest.mark.parametrize(
    ("said", "noted"),
    [
        ({"content": None, "tool_calls": [], "function_call": OLD_CALL}, True),
        ({"content": "", "function_call": json.dumps(OLD_CALL)}, True),
        ({"tool_calls": [{"name": "find", "parameters": {"color": "red"}}]}, True),
        ({"tool_calls": [{"type": "tool_use", "name": "find", "input": {"color": "red"}}]}, True),
        ({"tool_calls": [{"function": json.dumps(OLD_CALL)}]}, False),
    ],
)
def test_calls_of_other_interfaces_are_read_and_said(tmp_path, said, noted):
    rows = [{"m": [USER, {"role": "assistant", **said}, *CALLED[2:]]}]
    examples = sft(tmp_path, rows, TOOL_TEMPLATE)
    assert learned(examples) == CALLED_TEXT
    text = "1 of 1 rows write tool calls otherwise than OpenAI's tool_calls with arguments (function_call, parameters, input)"
    assert warnings(examples) == ([f"{text}, and are read so."] if noted else [])


def test_arguments_that_a_template_leaves_out(tmp_path):
    template = TOOL_TEMPLATE.replace("c.function.arguments | tojson", "c.arguments")
    assert fault(tmp_path, {"m": CALLED}, template) == (
        " has a tool call in its message 1 whose arguments the chat template leaves out (it renders '<call>find </call><|im_end|>'"
        "): use a template that renders them"
    )


def test_roles_that_a_template_speaks_of_without_asking_for_them(tmp_path):
    for role in ("content", "find", ""):
        told = fault(tmp_path, {"m": [{"role": role, "content": "q"}, ANSWER]}, TOOL_TEMPLATE + "{# 'find' #}{{ '' }}")
        assert told.startswith(f"has the unknown role {role!r} in its message 0: ")


def test_system_turns_and_tools_in_other_places(tmp_path):
    system = "<|im_start|>system\ns<|im_end|>\n"
    examples = sft(tmp_path, [{"m": [USER, ANSWER], "system": "s", "functions": [FIND]}], TOOL_TEMPLATE)
    assert learned(examples) == SHOWN_TOOLS + system + QA
    assert warnings(examples) == ["1 of 1 rows have a field system or system_prompt, which is read as the system turn."]
    assert learned(sft(tmp_path, [{"m": [USER, ANSWER], "system_prompt": "s"}])) == system + QA
    own = sft(tmp_path, [{"m": [{"role": "system", "content": "t"}, USER, ANSWER], "system": "s"}])
    assert learned(own) == system.replace("s<|", "t<|") + QA
    pair = {"p": "q", "chosen": "a", "rejected": "b", "system": "s"}
    spec = RecordSpec(write(tmp_path, [pair]), prompt_key="p", apply_chat_template=True)
    ((chosen, _),) = load_pairs(spec, chatting())
    assert parts(chosen, tiny_tokenizer()) == system + QA
    inside = [{"role": "system", "content": "s", "tools": json.dumps(TOOLS)}, USER, ANSWER]
    said = warnings(sft(tmp_path, [{"m": inside}]))
    assert any("have tools that the chat template does not show" in text for text in said)


def test_turns_that_say_that_they_are_not_to_be_learned(tmp_path):
    for mark in ({"weight": 0}, {"train": False}):
        messages = [USER, {**ANSWER, **mark}, USER, ANSWER]
        examples = sft(tmp_path, [{"m": messages}])
        assert learned(examples) == QA.replace("[", "").replace("]", "") + "\n" + QA
        assert warnings(examples) == [
            "1 of 1 rows have turns of the assistant that are marked with weight 0 or train false, and are not learned."
        ]
    assert fault(tmp_path, {"m": [USER, {**ANSWER, "weight": 0}]}) == (
        " has nothing to learn, since each answer is marked with weight 0 or train false: remove the row"
    )
    assert fault(tmp_path, {"m": [USER, {**ANSWER, "weight": 0.5}]}) == (
        "has the weight 0.5 in its message 1: a turn is learned or not, write 1 or 0"
    )


def test_reasoning_in_two_places(tmp_path):
    answer = {"role": "assistant", "content": "<think>hm</think>a", "reasoning_content": "hm"}
    assert fault(tmp_path, {"m": [USER, answer]}) == (
        "has reasoning both in its content and beside it in its message 1: keep it in one of the two places"
    )


def test_pairs_that_differ_in_what_is_not_rendered(tmp_path):
    pair = {"p": "q", "chosen": [{**ANSWER, "reasoning_content": "why"}], "rejected": [ANSWER]}
    told = r"^Line 1 of .* has two answers that become the same text, since the chat template leaves out or trims what differs: "
    with pytest.raises(DataError, match=told):
        load_pairs(RecordSpec(write(tmp_path, [pair]), prompt_key="p", apply_chat_template=True), chatting())


def test_answers_that_say_nothing_have_a_score_in_every_form(tmp_path):
    spec, tokenizer = SCORED, chatting()
    found = []
    for output in ("", " ", [], [{"role": "assistant", "content": ""}]):
        _, (ids,) = read_outputs(load_mixture(write(tmp_path, [{"m": "q", "o": output}]), None), spec, tokenizer)
        found.append(ids)
    assert all(ids == found[0] == [*tokenizer(HEAD)["input_ids"], STOP] for ids in found)
    with pytest.raises(DataError, match=r"^Line 1 of .* has an empty prompt: fill it in or remove the row"):
        read_outputs(load_mixture(write(tmp_path, [{"m": [], "o": "x"}]), None), spec, tokenizer)


def test_half_a_character_in_the_name_of_a_source(tmp_path):
    assert fault(tmp_path, {"m": "q", "datasource": "\ud83d"}, loader=asked) == (
        ": the field 'datasource' has half a character (\\ud83d) in its text: correct or remove the row."
    )


def test_loops_take_the_prompt_of_a_row_with_all_that_renders_it():
    row = {"q": [USER, ANSWER], "tools": TOOLS, "system": "s", "functions": None, "other": 1}
    asked_for = _asked(row["q"])
    assert asked_for == [USER]
    assert _asked("q") == "q"
    assert _shown({**row, "q": asked_for}, "q") == {"prompt": [USER], "tools": TOOLS, "system": "s"}
