"""Supervised rows: learned tokens derived by hand, the end token, the boundary of prompt and answer, every drop."""

import dataclasses
import json

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import normalizers, processors
from transformers import ByT5Tokenizer

from tests.records import MARKED, SMOL, merging_tokenizer, parts
from tests.tiny import CHAT_TEMPLATE, START, STOP, tiny_tokenizer
from togi.config.choices import Overlong
from togi.data.chat import load_tokenizer
from togi.data.records import RecordSpec, load_sft
from togi.data.turns import Draft, check_decoding, encode_drafts
from togi.errors import DataError

TURNS = [
    {"role": "user", "content": "q1"},
    {"role": "assistant", "content": "a1"},
    {"role": "user", "content": "q2"},
    {"role": "assistant", "content": "a2"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def load(tmp_path, tokenizer, rows, **settings):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_sft(RecordSpec(str(path), **settings), tokenizer)


def only(examples):
    ((sample,),) = examples
    return sample


PLAIN = {"input_key": "q", "output_key": "a"}


def test_two_strings_by_hand(tmp_path, tokenizer):
    sample = only(load(tmp_path, tokenizer, [{"q": "hi", "a": "ok"}], input_template="U: {}\nA:", **PLAIN))
    # "U: hi\nA:" has 8 bytes, "ok" two, and the end token follows as an id.
    assert sample.tokens.tolist() == tokenizer("U: hi\nA:ok")["input_ids"] + [STOP]
    assert sample.loss_mask.tolist() == [False] * 8 + [True] * 3
    assert (sample.prompt_length, sample.group_id) == (8, "0:0")
    assert (dict(sample.streams), dict(sample.values), sample.tokens.dtype) == ({}, {}, np.int64)


def test_an_answer_that_ends_with_eos_gets_no_second(tmp_path, tokenizer):
    sample = only(load(tmp_path, tokenizer, [{"q": "hi", "a": "ok<|im_end|>"}], **PLAIN))
    assert parts(sample, tokenizer) == "hi[ok<|im_end|>]"
    # Another special token is no end token of plain text.
    sample = only(load(tmp_path, tokenizer, [{"q": "hi", "a": "ok<|endoftext|>"}], **PLAIN))
    assert parts(sample, tokenizer) == "hi[ok<|endoftext|><|im_end|>]"
    # White space of the answer is the answer's.
    sample = only(load(tmp_path, tokenizer, [{"q": "hi", "a": " ok \n"}], **PLAIN))
    assert parts(sample, tokenizer) == "hi[ ok \n<|im_end|>]"


@pytest.mark.parametrize(
    "row",
    [
        {"q": "hi", "a": "ok"},
        {"q": [{"role": "user", "content": "hi"}], "a": "ok"},
        {"q": [{"role": "user", "content": "hi"}], "a": [{"role": "assistant", "content": "ok"}]},
    ],
)
@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED])
def test_chat_with_two_fields(tmp_path, row, template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    sample = only(load(tmp_path, tokenizer, [row], apply_chat_template=True, input_template="not used {}", **PLAIN))
    # 3 specials, "user\nhi", "\n" and "assistant\n" are the prompt; the line break after the end token is cut off.
    assert len(sample.tokens) == 3 + 7 + 1 + 10 + 2 + 1
    assert sample.prompt_length == 21
    assert parts(sample, tokenizer) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[ok<|im_end|>]"


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED])
def test_conversations(tmp_path, template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    rows = [{"m": TURNS}]
    single = only(load(tmp_path, tokenizer, rows, apply_chat_template=True, input_key="m"))
    head = "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n"
    tail = "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n[a2<|im_end|>]"
    assert parts(single, tokenizer) == f"{head}a1<|im_end|>\n{tail}"
    multi = only(load(tmp_path, tokenizer, rows, apply_chat_template=True, input_key="m", multiturn=True))
    assert parts(multi, tokenizer) == f"{head}[a1<|im_end|>]\n{tail}"
    np.testing.assert_array_equal(single.tokens, multi.tokens)
    split = [{"m": TURNS[:3], "a": "a2"}]
    both = only(
        load(tmp_path, tokenizer, split, apply_chat_template=True, input_key="m", output_key="a", multiturn=True)
    )
    assert parts(both, tokenizer) == parts(multi, tokenizer)


def test_multiturn_skips_what_nobody_says(tmp_path, tokenizer):
    turns = [
        {"role": "assistant", "content": "greeting"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": ""},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": " a \n"},
        {"role": "user", "content": "thanks"},
    ]
    sample = only(load(tmp_path, tokenizer, [{"m": turns}], apply_chat_template=True, input_key="m", multiturn=True))
    text = parts(sample, tokenizer)
    assert text.count("[") == 1
    # The last message of the user leads to nothing and is not computed.
    assert text.endswith("<|im_start|>tool\n4<|im_end|>\n<|im_start|>assistant\n[ a \n<|im_end|>]")


def test_template_without_end_of_turn_gets_eos_once(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    sample = only(load(tmp_path, tokenizer, [{"m": TURNS}], apply_chat_template=True, input_key="m", multiturn=True))
    assert parts(sample, tokenizer) == "user: q1\nassistant: [a1]\nuser: q2\nassistant: [a2<|im_end|>]"


def test_a_closing_token_other_than_eos_is_enough(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|im_end|>", "<|endoftext|>")
    sample = only(load(tmp_path, tokenizer, [{"q": "hi", "a": "ok"}], apply_chat_template=True, **PLAIN))
    assert parts(sample, tokenizer).endswith("assistant\n[ok<|endoftext|>]")


def test_pretrain_mode_learns_every_token_with_a_prediction(tmp_path, tokenizer):
    sample = only(
        load(tmp_path, tokenizer, [{"q": "text\n"}], input_key="q", pretrain_mode=True, input_template="no {}")
    )
    assert sample.tokens.tolist() == tokenizer("text\n")["input_ids"]
    assert sample.loss_mask.tolist() == [False, True, True, True, True]
    assert sample.prompt_length == 0


def test_a_token_across_the_boundary_is_the_first_of_the_answer(tmp_path):
    tokenizer = merging_tokenizer(("Ġ", "y"))
    examples = load(
        tmp_path, tokenizer, [{"q": "hi", "a": "yes"}, {"q": "hi", "a": "no"}], input_template="{} A: ", **PLAIN
    )
    (yes,), (no,) = examples
    # "hi A:" is 5 tokens; then " y" in one token, or " " alone.
    assert yes.tokens.tolist() == tokenizer("hi A: yes")["input_ids"] + [tokenizer.eos_token_id]
    assert parts(yes, tokenizer) == "hi A:[ yes<|im_end|>]"
    assert (yes.prompt_length, len(yes.tokens)) == (5, 9)
    assert parts(no, tokenizer) == "hi A: [no<|im_end|>]"
    assert (no.prompt_length, len(no.tokens)) == (6, 9)
    assert any("1 of 2 rows one token holds the end of the prompt" in line for line in examples.report.warnings)
    unmerged = load(tmp_path, tokenizer, [{"q": "hi", "a": " yes"}], input_template="{} A:", **PLAIN)
    assert parts(only(unmerged), tokenizer) == "hi A:[ yes<|im_end|>]"
    assert unmerged.report.warnings == ()


def test_characters_of_several_tokens(tmp_path, tokenizer):
    sample = only(load(tmp_path, tokenizer, [{"q": "é", "a": "研ぎ"}], **PLAIN))
    # UTF-8: two bytes, then twice three, then the end token.
    assert sample.loss_mask.tolist() == [False] * 2 + [True] * 7


def test_bos_of_plain_text_is_never_learned(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", START)]
    )
    sample = only(load(tmp_path, tokenizer, [{"q": "hi", "a": "ok"}], **PLAIN))
    assert parts(sample, tokenizer) == "<|im_start|>hi[ok<|im_end|>]"
    with pytest.raises(DataError, match=r"^Line 1 of .* would start with the BOS token '<\|im_start\|>' twice"):
        load(tmp_path, tokenizer, [{"q": "<|im_start|>hi", "a": "ok"}], **PLAIN)
    raw = only(load(tmp_path, tokenizer, [{"q": "hi"}], input_key="q", pretrain_mode=True))
    assert parts(raw, tokenizer) == "<|im_start|>[hi]"


def test_overlong(tmp_path, tokenizer):
    rows = [{"q": "12345", "a": "678"}, {"q": "1234", "a": "678"}, {"q": "123456789", "a": "0"}]
    # With the end token 9, 8 and 11 tokens.
    dropped = load(tmp_path, tokenizer, rows, max_len=8, **PLAIN)
    assert parts(only(dropped), tokenizer) == "1234[678<|im_end|>]"
    assert dict(dropped.report.sources[0].dropped) == {"too long": 2}
    assert dropped.report.lengths.max == 11
    cut = load(tmp_path, tokenizer, rows, max_len=8, overlong=Overlong.TRUNCATE, **PLAIN)
    # A row that is cut has no end token, also if only that would not fit.
    assert [parts(s, tokenizer) for (s,) in cut] == ["12345[678]", "1234[678<|im_end|>]"]
    assert dict(cut.report.sources[0].dropped) == {"nothing to learn left when cut": 1}
    assert "1 rows were cut to --max_len 8; they have no end token." in cut.report.warnings
    with pytest.raises(DataError, match=r"^Line 1 of .*a.jsonl has 9 tokens, more than --max_len 8: raise it, or"):
        load(tmp_path, tokenizer, rows, max_len=8, overlong=Overlong.ERROR, **PLAIN)


def test_cutting_a_conversation_keeps_its_first_turns(tmp_path, tokenizer):
    sample = only(
        load(
            tmp_path,
            tokenizer,
            [{"m": TURNS}],
            apply_chat_template=True,
            input_key="m",
            multiturn=True,
            max_len=26,
            overlong=Overlong.TRUNCATE,
        )
    )
    text = "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n[a1<|im_end|>]\n<|im_start|>"
    assert parts(sample, tokenizer) == text


def test_empty_rows_are_dropped_counted_and_named(tmp_path, tokenizer):
    rows = [{"q": " ", "a": "x"}, {"q": "x", "a": ""}, {"q": "x", "a": None}, *[{"q": "x", "a": "y"}] * 3]
    examples = load(tmp_path, tokenizer, rows, max_bad_rows=0.5, **PLAIN)
    assert len(examples) == 3
    assert dict(examples.report.sources[0].dropped) == {"empty prompt": 1, "empty answer": 2}
    (warning,) = examples.report.warnings
    path = tmp_path / "a.jsonl"
    assert warning == (
        "3 of 6 rows are faulty and were left out (1 empty prompt, 2 empty answer); the first: Line 1 of "
        f"{path} has an empty prompt: fill it in or remove the row."
    )
    assert [fault.place for fault in examples.report.faults.first] == [f"Line {line} of {path}" for line in (1, 2, 3)]
    chats = [
        {"m": []},
        {"m": TURNS[1:2]},
        {"m": [TURNS[0], {"role": "assistant", "content": " "}]},
        *[{"m": TURNS}] * 3,
    ]
    examples = load(tmp_path, tokenizer, chats, apply_chat_template=True, input_key="m", max_bad_rows=0.5)
    assert dict(examples.report.sources[0].dropped) == {"empty prompt": 2, "empty answer": 1}
    rows = [{"q": ""}, {"q": "a"}, {"q": "ab"}, {"q": "ab"}]
    texts = load(tmp_path, tokenizer, rows, input_key="q", pretrain_mode=True, max_bad_rows=0.5)
    # One token has nothing before it to be predicted from.
    assert dict(texts.report.sources[0].dropped) == {"empty prompt": 1, "empty answer": 1}


SYSTEM_TURN = (
    "it is read as the system turn and must be a string; correct it, or rename the field if it is something else"
)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            {"m": TURNS[:1]},
            " has no turn of the assistant, so there is nothing to learn: add the answer or remove the row",
        ),
        ({"m": TURNS, "system": ["Be brief."]}, f": the field 'system' is the list ['Be brief.']: {SYSTEM_TURN}"),
        ({"m": TURNS, "system_prompt": 3}, f": the field 'system_prompt' is the number 3: {SYSTEM_TURN}"),
    ],
)
def test_what_a_conversation_lacks_or_cannot_say(tmp_path, tokenizer, row, sentence):
    with pytest.raises(DataError) as error:
        load(tmp_path, tokenizer, [row], apply_chat_template=True, input_key="m", multiturn=True, max_bad_rows=0.0)
    assert str(error.value).startswith(f"Line 1 of {tmp_path}/a.jsonl{sentence} (the first of 1 faulty rows")


def test_too_many_faults_stop_the_run(tmp_path, tokenizer):
    rows = [{"q": "x", "a": ""}] * 2 + [{"q": "x", "a": "y"}] * 18
    limit = (
        r"\(the first of 2 faulty rows among 20, more than --max_bad_rows 0.05 allows: correct them, or raise the limit"
    )
    with pytest.raises(DataError, match=rf"^Line 1 of .*a.jsonl has an empty answer: .* the row {limit}"):
        load(tmp_path, tokenizer, rows, **PLAIN)
    assert len(load(tmp_path, tokenizer, rows[1:] + rows[-1:], **PLAIN)) == 19  # 1 of 20 is not more than 0.05
    with pytest.raises(DataError, match=r"1 faulty rows among 20, more than --max_bad_rows 0 allows"):
        load(tmp_path, tokenizer, rows[1:] + rows[-1:], max_bad_rows=0.0, **PLAIN)
    with pytest.raises(DataError, match=r"^No row of .* can be used \(dropped: 3 too long; longest: 3 tokens\)"):
        load(tmp_path, tokenizer, [{"q": "x", "a": "y"}] * 3, max_len=2, **PLAIN)


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"q": "x"}, PLAIN, r"^Line 2 of .*a.jsonl has no field 'a'"),
        (
            {"q": 3, "a": "x"},
            PLAIN,
            r"^Line 2 of .*: the field 'q' is the number 3, not a string: correct or remove the row",
        ),
        (
            {"q": "x", "a": ["y"]},
            PLAIN,
            r"^Line 2 of .*: the field 'a' is the list \['y'\], not a string: use --apply_chat_template for lists",
        ),
        (
            {"q": 3, "a": "x"},
            {**PLAIN, "apply_chat_template": True},
            r"^Line 2 of .*: the field 'q' is the number 3: it must",
        ),
        (
            {"q": "x", "a": [{"role": "user", "content": "y"}]},
            {**PLAIN, "apply_chat_template": True},
            r"^Line 2 of .*: the field 'a' ends with a message of role 'user', which cannot be learned",
        ),
        (
            {"q": TURNS[:1], "a": TURNS[2:]},
            {**PLAIN, "apply_chat_template": True},
            r"^Line 2 of .*: the conversation in 'a' does not begin with the prompt in 'q'",
        ),
        (
            {"q": "x", "a": "y"},
            {"input_key": "q", "apply_chat_template": True},
            r"^Line 2 of .*: the field 'q' is a string, but without --output_key it must be a list of messages",
        ),
        (
            {"q": TURNS[:3], "a": "y"},
            {"input_key": "q", "apply_chat_template": True},
            r"^Line 2 of .*: the field 'q' ends with a message of role 'user'",
        ),
    ],
)
def test_bad_rows(tmp_path, tokenizer, row, settings, message):
    fine = {"q": TURNS[:2] if "output_key" not in settings else "x", "a": "y"}
    with pytest.raises(DataError, match=message):
        load(tmp_path, tokenizer, [fine, row], **settings)


def test_an_answer_without_a_field_is_a_defect_as_the_settings_refuse_it(tmp_path, tokenizer):
    with pytest.raises(AssertionError, match="--output_key is not set"):
        load(tmp_path, tokenizer, [{"q": "x", "a": "y"}], input_key="q")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{{ messages|length }}{{ messages[-1]['content'] }}",
            r"^Line 1 of .* before its message 1 rendered differently",
        ),
        (
            CHAT_TEMPLATE.replace("message['content']", "message['content'] | upper"),
            r"^Line 1 of .* has its message 1 changed by the chat template \(.*'A1<\|im_end\|>', the message 'a1'\)",
        ),
        (
            MARKED.replace("== 'assistant'", "!= 'system'"),
            r"^Line 1 of .* has 2 messages of the assistant, but the chat template marks 4 parts",
        ),
        (MARKED.replace("== 'assistant'", "== 'user'"), r"^Line 1 of .* 'q1<\|im_end\|>', the message 'a1'\)"),
        ("{{ raise_exception('no') }}", r"^Line 1 of .* is refused by the chat template \(no\)"),
        (MARKED + "{{ raise_exception('no') }}", r"^Line 1 of .* is refused by the chat template \(no\)"),
    ],
)
def test_templates_that_cannot_be_used(tmp_path, template, message):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=message):
        load(tmp_path, tokenizer, [{"m": TURNS}], apply_chat_template=True, input_key="m", multiturn=True)


def test_a_row_that_breaks_the_template_is_one_bad_row(tmp_path):
    """Templates are code, and fail on a row in any way: here a string + a list, and a field that is not there."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace(
        "message['content']", "message['content'] + '' + message['name'] * 0"
    )
    named = [{**turn, "name": ""} for turn in TURNS]
    rows = [
        {"m": named},
        {"m": [named[0], {**named[1], "name": [1, 2]}, *named[2:]]},
        {"m": [*named[:3], {**named[3], "name": 2.5}]},
    ]
    examples = load(tmp_path, tokenizer, rows, apply_chat_template=True, input_key="m", max_bad_rows=0.7)
    assert len(examples) == 1
    assert examples.report.faults.by_kind == {"refused by the template": 2}
    reasons = [fault.reason for fault in examples.report.faults.first]
    assert all("is refused by the chat template (TypeError: " in reason for reason in reasons)


def test_half_a_character_is_a_bad_row(tmp_path, tokenizer):
    """A text that was cut inside an emoji: JSON can say it, no tokenizer can read it."""
    (tmp_path / "a.jsonl").write_text('{"q": "x", "a": "y"}\n{"q": "x", "a": "fine \\ud83d"}\n')
    examples = load_sft(RecordSpec(str(tmp_path / "a.jsonl"), max_bad_rows=0.5, **PLAIN), tokenizer)
    assert parts(only(examples), tokenizer) == "x[y<|im_end|>]"
    (fault,) = examples.report.faults.first
    assert fault.reason.endswith("a.jsonl has half a character (\\ud83d) in its text: correct or remove the row.")
    assert fault.place.startswith("Line 2 of ")


def test_places_in_tables_and_lists(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "tables")
    rows = [{"q": "x", "a": "y"}, {"q": "x", "a": ""}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.csv").write_text('q,a\n"x\n",y\nx,\n')
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name, place in (("json", "Item 1 of the list in"), ("csv", "Line 4 of"), ("parquet", "Row 1 of")):
        path = tmp_path / f"a.{name}"
        faults = load_sft(RecordSpec(str(path), max_bad_rows=0.5, **PLAIN), tokenizer).report.faults
        assert [(fault.place, fault.kind) for fault in faults.first] == [(f"{place} {path}", "empty answer")]


def test_a_key_that_no_row_has_names_the_nearest(tmp_path, tokenizer):
    rows = [{"question": "x", "answer": "y"}] * 3
    for limit in (0.05, 1.0):
        with pytest.raises(DataError, match=r"Line 1 of .* has no field 'anser'.*did you mean --output_key answer\?"):
            load(tmp_path, tokenizer, rows, input_key="question", output_key="anser", max_bad_rows=limit)


def test_the_chat_template_of_the_flag_is_used(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    own = load_tokenizer(str(tmp_path / "model"), chat_template=None, trust_remote_code=False)
    other = load_tokenizer(
        str(tmp_path / "model"),
        chat_template="{% for m in messages %}{{ m['role'] }}={{ m['content'] }};{% endfor %}"
        "{% if add_generation_prompt %}assistant={% endif %}",
        trust_remote_code=False,
    )
    rows = [{"q": "hi", "a": "ok"}]
    head = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert parts(only(load(tmp_path, own, rows, apply_chat_template=True, **PLAIN)), own) == f"{head}[ok<|im_end|>]"
    # It has no closing token, so that the end token follows.
    assert parts(only(load(tmp_path, other, rows, apply_chat_template=True, **PLAIN)), own) == (
        "user=hi;assistant=[ok;<|im_end|>]"
    )


def test_tokenizers_that_cannot_be_used(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"^The tokenizer has no EOS token"):
        load(tmp_path, tokenizer, [{"q": "x", "a": "y"}], **PLAIN)

    with pytest.raises(DataError, match=r"^The tokenizer ByT5Tokenizer cannot say which characters a token is made of"):
        load(tmp_path, ByT5Tokenizer(), [{"q": "x", "a": "y"}], input_key="q", pretrain_mode=True)


def test_learned_tokens_must_hold_the_text(tokenizer):
    draft = Draft("hi ok", ((3, 5),), complete=False)
    (coded,) = encode_drafts([draft], tokenizer, add_special_tokens=True, enders={STOP})
    assert coded.runs == ((3, 5),)
    check_decoding(draft, coded, tokenizer)
    with pytest.raises(DataError, match=r"^has the part 'ok' to learn, but the tokens at its place say ' o'"):
        check_decoding(draft, dataclasses.replace(coded, runs=((2, 4),)), tokenizer)


def test_offsets_without_white_space(tmp_path):
    """Some tokenizers report " yes" as if it began at its y, and a space alone as nothing."""
    tokenizer = merging_tokenizer(("Ġ", "y"))
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    assert tokenizer("a y ", return_offsets_mapping=True)["offset_mapping"] == [(0, 1), (2, 3), (4, 4)]
    for answer in (" yes", "  no ", "\n"):
        sample = only(load(tmp_path, tokenizer, [{"q": "hi", "a": f"a{answer}"}], input_template="{} A:", **PLAIN))
        assert parts(sample, tokenizer) == f"hi A:[a{answer}<|im_end|>]"
        sample = only(load(tmp_path, tokenizer, [{"q": "hi", "a": f"{answer}b"}], input_template="{} A:", **PLAIN))
        assert parts(sample, tokenizer) == f"hi A:[{answer}b<|im_end|>]"


def test_an_answer_without_tokens_is_empty(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("!", "")
    examples = load(tmp_path, tokenizer, [{"q": "x", "a": "!!"}, {"q": "x", "a": "y"}], max_bad_rows=0.5, **PLAIN)
    assert dict(examples.report.sources[0].dropped) == {"empty answer": 1}


def test_a_tokenizer_that_changes_text_keeps_its_places(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace("!", "")]
    )
    sample = only(load(tmp_path, tokenizer, [{"q": "HI! ", "a": "OK! Yes"}], **PLAIN))
    assert parts(sample, tokenizer) == "hi [ok yes<|im_end|>]"


def test_mixtures_keep_order_ids_and_splits(tmp_path, tokenizer):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"q": "t", "a": "1"}\n')
    (folder / "test.jsonl").write_text('{"q": "e", "a": "1"}\n{"q": "e", "a": "2"}\n')
    single = tmp_path / "b.jsonl"
    single.write_text('{"q": "b", "a": "1"}\n')
    examples = load_sft(RecordSpec(f"{folder},{single}", split="test", **PLAIN), tokenizer)
    assert [(s.group_id, parts(s, tokenizer)) for (s,) in examples] == [
        ("0:0", "e[1<|im_end|>]"),
        ("0:1", "e[2<|im_end|>]"),
        ("1:0", "b[1<|im_end|>]"),
    ]
    assert examples.lengths().tolist() == [3, 3, 3]
    mixed = load_sft(RecordSpec(f"{folder},{single}", "0.5,0.5", split="test", seed=1, **PLAIN), tokenizer)
    ids = [s.group_id for (s,) in mixed]
    assert len(set(ids)) == len(ids) and any("#" in name for name in ids)
    capped = RecordSpec(f"{tmp_path}@set,{single}", "0.5,0.5", split="test", seed=1, max_samples=3, **PLAIN)
    assert [s.group_id for (s,) in load_sft(capped, tokenizer)] == ids[:3]
    first = load_sft(RecordSpec(f"{folder},{single}", split="test", max_samples=2, **PLAIN), tokenizer)
    # One row of each set: the later set does not vanish.
    assert [s.group_id for (s,) in first[:]] == ["0:0", "1:0"]


def test_fingerprint(tmp_path, tokenizer):
    rows = [{"q": "x", "a": "y"}, {"q": "x", "a": "z"}]
    first = load(tmp_path, tokenizer, rows, **PLAIN).fingerprint()
    assert first == load(tmp_path, tokenizer, rows, **PLAIN).fingerprint()
    assert first != load(tmp_path, tokenizer, rows[::-1], **PLAIN).fingerprint()
    # The same tokens with another boundary.
    assert (
        first
        != load(tmp_path, tokenizer, [{"q": "xy"[:1], "a": "y"}, {"q": "xz"[:1], "a": "y"}], **PLAIN).fingerprint()
    )


def test_report_shows_what_is_learned(tmp_path, tokenizer):
    examples = load(tmp_path, tokenizer, [{"q": "hi", "a": "ok"}], **PLAIN)
    assert examples.report.examples == ("hi⟦ok<|im_end|>⟧",)
    assert examples.report.kept == examples.report.picked == 1


@pytest.mark.skipif(not SMOL.is_dir(), reason=f"the real tokenizer is not in {SMOL} (set TOGI_CACHE)")
def test_real_tokenizer(tmp_path):
    tokenizer = load_tokenizer(str(SMOL), chat_template=None, trust_remote_code=False)
    sample = only(load(tmp_path, tokenizer, [{"m": TURNS}], apply_chat_template=True, input_key="m", multiturn=True))
    assert parts(sample, tokenizer).endswith(
        "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n[a1<|im_end|>]\n"
        "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n[a2<|im_end|>]"
    )
    full = tokenizer.apply_chat_template(TURNS, tokenize=True, return_dict=True)["input_ids"]
    assert sample.tokens.tolist() == full[:-1]
    marked = load_tokenizer(str(SMOL), chat_template=MARKED, trust_remote_code=False)
    again = only(load(tmp_path, marked, [{"m": TURNS}], apply_chat_template=True, input_key="m", multiturn=True))
    theirs = marked.apply_chat_template(TURNS, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert again.tokens.tolist() == theirs["input_ids"][: len(again.tokens)]
    # Their mask also has the line break after each end token, which is never generated.
    breaks = np.flatnonzero(again.tokens == tokenizer.eos_token_id)[[1]] + 1
    expected = np.array(theirs["assistant_masks"][: len(again.tokens)], dtype=bool)
    assert expected[breaks].all()
    expected[breaks] = False
    np.testing.assert_array_equal(again.loss_mask, expected)
    # BPE merges the space with the answer: " yes" is one token.
    plain = only(load(tmp_path, tokenizer, [{"q": "hi", "a": "yes"}], input_template="{} A: ", **PLAIN))
    assert parts(plain, tokenizer) == "hi A:[ yes<|im_end|>]"
