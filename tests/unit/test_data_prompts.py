"""Rendering, tokenising once, counting every dropped row, and dealing each prompt once per episode."""

import dataclasses
import datetime
import json
import os
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from tests.tiny import START, STOP, tiny_tokenizer
from togi.data.chat import decode, encode, load_tokenizer, plain_prompt, render_messages, stop_token_ids, visible
from togi.data.messages import USER, dialogue_of
from togi.data.prompts import LoaderState, PromptLoader, PromptSpec, load_prompts
from togi.data.report import Lengths
from togi.errors import DataError
from togi.sample import Prompt

SMOL = Path(os.environ.get("TOGI_CACHE", "~/.cache/togi")).expanduser() / "smollm2-135m-instruct"
RENDERED = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def render_chat(value, tokenizer):
    return render_messages(dialogue_of(value, USER, None), tokenizer, add_generation_prompt=True)


def test_chat_text_and_tokens(tokenizer):
    for value in ("hi", [{"role": "user", "content": "hi"}], [{"role": "user", "content": "hi", "name": None}]):
        text = render_chat(value, tokenizer)
        assert text == RENDERED
    (ids,) = encode([text], tokenizer, add_special_tokens=False)
    # 3 special tokens, "user\nhi" (7 bytes), "\n" and "assistant\n" (10 bytes).
    assert len(ids) == 3 + 7 + 1 + 10
    assert [i for i in ids if i >= 256] == [START, STOP, START]
    assert visible(tokenizer, ids) == RENDERED
    assert decode(tokenizer, ids) == "user\nhi\nassistant\n"


def test_plain_text(tokenizer):
    assert plain_prompt("{x} {}", None) == "{x} {}"
    template = "User: {}\nAssistant: {json}"
    text = plain_prompt("a{}", template)
    assert text == "User: a{}\nAssistant: {json}"


@pytest.mark.parametrize(
    ("value", "chat", "message"),
    [
        ([{"role": "user", "content": "x"}], False, "is the list .*, not a string: use --apply_chat_template"),
        (3, True, "is the number 3: it must be a string or a list of messages"),
        ([{"content": "x"}], True, "no role and content in its message 0"),
        (["x"], True, "no role and content in its message 0"),
    ],
)
def test_values_that_are_no_prompts(tmp_path, tokenizer, value, chat, message):
    path = write(tmp_path / "a.jsonl", [{"input": "fine"}, {"input": value}])
    rows = [{"input": "fine"}, {"input": value}]
    with pytest.raises(DataError, match=rf"^Line 2 of .*a.jsonl: the field 'input' .*{message}"):
        load_prompts(PromptSpec(path, apply_chat_template=chat), tokenizer)
    assert rows[0]["input"] == "fine"


def test_template_refusal_names_the_row(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    path = write(tmp_path / "a.jsonl", [{"input": "x"}])
    with pytest.raises(DataError, match=r"^Line 1 of .* is refused by the chat template \(no system role\)"):
        load_prompts(PromptSpec(path, apply_chat_template=True), tokenizer)


def test_doubled_bos(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "<|im_start|>{{ messages[0]['content'] }}"
    path = write(tmp_path / "a.jsonl", [{"input": "fine"}, {"input": "<|im_start|>x"}])
    with pytest.raises(
        DataError, match=r"a.jsonl: The prompt '.*x' would start with the BOS token '<\|im_start\|>' twice"
    ):
        load_prompts(PromptSpec(path, apply_chat_template=True), tokenizer)


def with_specials(template):
    """The tiny tokenizer with ``template`` around plain text, as a post-processor adds BOS or EOS."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("<|im_start|>", START), ("<|im_end|>", STOP)]
    )
    return tokenizer


def test_plain_text_gets_the_tokenizers_own_bos_once(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"input": "x"}])
    tokenizer = with_specials("<|im_start|> $A")
    (prompt,) = load_prompts(PromptSpec(path), tokenizer)
    assert prompt.tokens[0] == START and len(prompt.tokens) == 2
    (prompt,) = load_prompts(PromptSpec(path, apply_chat_template=True), tokenizer)
    assert prompt.tokens[:2] != (START, START)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert (
        "the chat template does not"
        in load_prompts(PromptSpec(path, apply_chat_template=True), tokenizer).report.warnings[0]
    )
    with pytest.raises(DataError, match="ends every text with its EOS token"):
        load_prompts(PromptSpec(path), with_specials("$A <|im_end|>"))


def test_rendering_flags_are_checked_first(tokenizer):
    bare = tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(DataError, match="--apply_chat_template needs a chat template"):
        load_prompts(PromptSpec("nothing.jsonl", apply_chat_template=True), bare)
    for template in ("no slot", "{} and {}"):  # the settings refuse it
        with pytest.raises(AssertionError, match=r"--input_template must contain \{\} exactly once"):
            load_prompts(PromptSpec("nothing.jsonl", input_template=template), tokenizer)


def test_load_tokenizer_and_stop_tokens(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    own = load_tokenizer(str(tmp_path), chat_template=None, trust_remote_code=False)
    assert render_chat("hi", own) == RENDERED
    other = load_tokenizer(str(tmp_path), chat_template="{{ messages[0]['content'] }}", trust_remote_code=False)
    assert render_chat("hi", other) == "hi"
    assert stop_token_ids(own, str(tmp_path), chat=True) == (STOP,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 3]}')
    assert stop_token_ids(own, str(tmp_path), chat=True) == (3, 7, STOP)
    (tmp_path / "generation_config.json").unlink()
    own.eos_token = None
    with pytest.raises(DataError, match="names an EOS token"):
        stop_token_ids(own, str(tmp_path), chat=False)
    with pytest.raises(DataError, match="No tokenizer can be loaded from"):
        load_tokenizer(str(tmp_path / "nothing"), chat_template=None, trust_remote_code=False)


@pytest.mark.skipif(not SMOL.exists(), reason="the real tokenizer is not cached")
def test_real_tokenizer(tmp_path):
    tokenizer = load_tokenizer(str(SMOL), chat_template=None, trust_remote_code=False)
    path = write(tmp_path / "a.jsonl", [{"input": "What is 2+2?", "label": 4}])
    prompts = load_prompts(PromptSpec(path, label_key="label", apply_chat_template=True), tokenizer)
    assert prompts[0].text.endswith("<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n")
    assert visible(tokenizer, prompts[0].tokens) == prompts[0].text == prompts.report.examples[0]
    assert prompts[0].tokens[0] == 1 and prompts[0].tokens[1] != 1
    assert stop_token_ids(tokenizer, str(SMOL), chat=True) == (2,)


def test_every_row_is_accounted_for(tmp_path, tokenizer):
    rows = [
        {"input": "abc", "label": {"any": ["json", 1.5, None]}},
        {"input": "", "label": 1},
        {"input": None, "label": 1},
        {"input": " \n", "label": 1},
        {"input": "abcdef", "label": 1},
        {"input": "abcde", "label": None, "datasource": "mine"},
    ]
    spec = PromptSpec(write(tmp_path / "a.jsonl", rows), label_key="label", prompt_max_len=5)
    prompts = load_prompts(spec, tokenizer)
    assert [(p.id, p.text, p.label, p.datasource) for p in prompts] == [
        ("0:0", "abc", {"any": ["json", 1.5, None]}, "default"),
        ("0:5", "abcde", None, "mine"),
    ]
    (source,) = prompts.report.sources
    assert (source.rows, source.picked, source.kept, dict(source.dropped)) == (6, 6, 2, {"empty": 3, "too long": 1})
    assert prompts.report.lengths == Lengths(3, 5, 6, 6, 6)
    assert prompts.report.examples == ("abc", "abcde")
    assert prompts.report.warnings == ("4 of 6 rows were dropped: check the keys, the template and the length limit.",)
    prompts.report.write(tmp_path / "run" / "prompts")
    assert json.loads((tmp_path / "run" / "prompts.json").read_text())["sources"][0]["dropped"] == source.dropped
    text = (tmp_path / "run" / "prompts.md").read_text()
    assert "2 of 6 rows are used; dropped: 3 empty, 1 too long." in text and "```\nabcde\n```" in text


def test_unusable_sets_are_errors(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [{"input": "abc"}, {"input": ""}])
    with pytest.raises(DataError, match=r"No prompt of .* 1 too long, 1 empty; longest: 3 tokens"):
        load_prompts(PromptSpec(path, prompt_max_len=2), tokenizer)
    path = write(tmp_path / "b.jsonl", [{"input": "a", "label": 1}, {"prompt": "b", "label": 1}, {"input": "c"}])
    with pytest.raises(DataError, match=r"^Line 2 of .*b.jsonl has no field 'input'; it has 'prompt', 'label'"):
        load_prompts(PromptSpec(path), tokenizer)
    path = write(tmp_path / "c.jsonl", [{"input": "a", "label": 1}, {"input": "c"}])
    with pytest.raises(DataError, match=r"^Line 2 of .*c.jsonl has no field 'label'"):
        load_prompts(PromptSpec(path, label_key="label"), tokenizer)


@pytest.mark.parametrize("value", [datetime.date(2026, 11, 30), Decimal("1.5"), b"bytes"], ids=repr)
def test_a_label_that_json_cannot_hold_names_its_row(tmp_path, tokenizer, value):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"input": ["a", "b"], "label": pyarrow.array([None, value])}), path)
    with pytest.raises(
        DataError, match=r"^Row 1 of .*a.parquet: the field 'label' is no JSON value .*: point --label_key"
    ):
        load_prompts(PromptSpec(str(path), label_key="label"), tokenizer)


def test_faulty_rows_are_left_out_up_to_a_limit(tmp_path, tokenizer):
    rows = [
        {"input": "a", "label": 1},
        {"input": 3, "label": 1},
        {"inptu": "b"},
        {"input": "c"},
        {"input": "d", "label": 2},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows) + "{'input'\n")
    prompts = load_prompts(PromptSpec(str(path), label_key="label", max_bad_rows=0.7), tokenizer)
    assert [(p.id, p.text, p.label) for p in prompts] == [("0:0", "a", 1), ("0:4", "d", 2)]
    faults = prompts.report.faults
    assert (faults.rows, faults.of) == (4, 6)
    assert dict(faults.by_kind) == {"wrong type": 1, "missing field": 2, "unreadable": 1}
    assert dict(prompts.report.sources[0].dropped) == dict(faults.by_kind)
    assert [fault.place for fault in faults.first] == [f"Line {n} of {path}" for n in (2, 3, 4, 6)]
    assert prompts.report.lengths == Lengths(1, 1, 1, 1, 1)
    assert prompts.report.warnings[1].startswith(
        f"4 of 6 rows are faulty and were left out (1 wrong type, 2 missing field, 1 unreadable); the first: Line 2 of {path}: "
    )
    with pytest.raises(
        DataError, match=r"^Line 2 of .* \(the first of 4 faulty rows among 6, more than --max_bad_rows 0.5"
    ):
        load_prompts(PromptSpec(str(path), label_key="label", max_bad_rows=0.5), tokenizer)


def test_mixture_repeats_and_datasources(tmp_path, tokenizer):
    a = write(tmp_path / "easy.jsonl", [{"input": "a"}, {"input": ""}])
    b = write(tmp_path / "hard.jsonl", [{"input": f"b{i}", "data_source": "other" if i else None} for i in range(6)])
    prompts = load_prompts(PromptSpec(f"{a},{b}", prompt_data_probs="0.5,0.5", seed=3), tokenizer)
    easy, hard = prompts.report.sources
    assert hard.rows == 6 and easy.rows == 2 and hard.picked >= 6
    assert easy.repeats == easy.picked - 2 and easy.dropped["empty"] + easy.kept == easy.picked
    assert len(prompts) == easy.kept + hard.kept
    assert {p.id.split("#")[0]: p.datasource for p in prompts} == {
        "0:0": "easy", "1:0": "hard", **{f"1:{i}": "other" for i in range(1, 6)}
    }  # fmt: skip
    again = load_prompts(PromptSpec(f"{a},{b}", prompt_data_probs="0.5,0.5", seed=3), tokenizer)
    assert again.fingerprint() == prompts.fingerprint()
    capped = load_prompts(PromptSpec(f"{a},{b}", max_samples=4), tokenizer)
    assert [source.picked for source in capped.report.sources] == [1, 3]


def prompts_of(n, text="text"):
    return [Prompt(f"0:{i}", (i,), f"{text} {i}") for i in range(n)]


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 23),
    episodes=st.integers(1, 3),
    takes=st.lists(st.tuples(st.integers(1, 30), st.booleans()), min_size=1, max_size=20),
)
def test_each_prompt_once_per_episode_over_takes_and_restores(n, episodes, takes):
    prompts = prompts_of(n)
    loader = PromptLoader(prompts, seed=5, episodes=episodes)
    seen = Counter()
    turn = 0
    while loader.remaining > 0:
        size, restore = takes[turn % len(takes)]
        turn += 1
        if restore:
            saved = json.loads(json.dumps(loader.state().to_json()))
            loader = PromptLoader(prompts, seed=5, episodes=episodes)
            loader.load_state(LoaderState(**saved))
        episode, left = loader.episode, loader.remaining
        batch = loader.take(size)
        in_episode = n - (episodes * n - left) % n
        assert len(batch) == min(size, in_episode)
        seen.update((episode, prompt.id) for prompt in batch)
    assert seen == Counter({(e, f"0:{i}"): 1 for e in range(episodes) for i in range(n)})
    assert loader.take(1) == []


def test_order_depends_on_seed_and_episode_only():
    def order(seed, sizes):
        loader = PromptLoader(prompts_of(10), seed=seed, episodes=2)
        return [p.id for size in sizes for p in loader.take(size)]

    assert order(1, [10, 10]) == order(1, [3, 3, 3, 3, 10])
    assert order(1, [10]) != order(2, [10])
    assert order(1, [10, 10])[:10] != order(1, [10, 10])[10:]


def test_resuming_with_other_data_is_refused():
    state = PromptLoader(prompts_of(4), seed=1, episodes=1).state()
    for prompts, seed, message in (
        (prompts_of(5), 1, "made with 4 prompts but the prompt set now has 5"),
        (prompts_of(4, "other"), 1, "made with other prompts"),
        (prompts_of(4), 2, "--seed 1 but this run has --seed 2"),
    ):
        with pytest.raises(DataError, match=message):
            PromptLoader(prompts, seed=seed, episodes=1).load_state(state)
    assert dataclasses.asdict(state) == state.to_json()
