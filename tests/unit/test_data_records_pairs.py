"""Preference pairs, labelled answers and their mismatched copies, and labelled steps: values derived by hand."""

import dataclasses
import json
import math

import numpy as np
import pytest

from tests.objective_tools import LOG2, LOG3, double, summary
from tests.records import MARKED, SMOL, merging_tokenizer, parts
from tests.tiny import STOP, tiny_tokenizer
from togi.config.choices import Overlong
from togi.config.parse import parse
from togi.data.chat import load_tokenizer
from togi.data.packing import pack, pack_stats
from togi.data.records import RecordSpec, load_pairs, load_steps, load_unpaired
from togi.data.rows import step_labels
from togi.errors import DataError
from togi.methods.kto_objective import mismatched
from togi.methods.orpo import ORPO
from togi.methods.preference import ORPOObjective, SimPOObjective
from togi.methods.simpo import SimPO
from togi.model.policy import Outputs

HISTORY = [{"role": "user", "content": "q"}]
GOOD = [*HISTORY, {"role": "assistant", "content": "good"}]
BAD = [*HISTORY, {"role": "assistant", "content": "bad"}]
UNPAIRED = {"input_key": "q", "output_key": "a"}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def load(loader, tmp_path, tokenizer, rows, **settings):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return loader(RecordSpec(str(path), **settings), tokenizer)


def pairs(tmp_path, tokenizer, rows, **settings):
    return load(load_pairs, tmp_path, tokenizer, rows, **settings)


def unpaired(tmp_path, tokenizer, rows, **settings):
    return load(load_unpaired, tmp_path, tokenizer, rows, **{**UNPAIRED, **settings})


def steps(tmp_path, tokenizer, rows, **settings):
    return load(load_steps, tmp_path, tokenizer, rows, **{"placeholder_token": "#", **settings})


def test_pair_of_strings(tmp_path, tokenizer):
    row = {"p": "hi", "chosen": "good", "rejected": "bad", "margin": 2}
    settings = {"prompt_key": "p", "input_template": "U: {} A:"}
    ((chosen, rejected),) = pairs(tmp_path, tokenizer, [row], margin_loss=True, **settings)
    assert parts(chosen, tokenizer) == "U: hi A:[good<|im_end|>]"
    assert parts(rejected, tokenizer) == "U: hi A:[bad<|im_end|>]"
    assert (chosen.prompt_length, rejected.prompt_length) == (8, 8)
    assert (chosen.group_id, rejected.group_id) == ("0:0", "0:0")
    assert dict(chosen.values) == {"chosen": 1.0, "margin": 2.0}
    assert dict(rejected.values) == {"chosen": 0.0, "margin": 2.0}
    # A margin is also read from text, as CSV has it, and without the flag it is none of the data's faults.
    for value, wanted in ((" 2.0", True), ("high", False), ("", False)):
        ((side, _),) = pairs(tmp_path, tokenizer, [{**row, "margin": value}], margin_loss=wanted, **settings)
        assert side.values["margin"] == (2.0 if wanted else 0.0)
    # Laid out together the prompt is there once.
    batch = pack([chosen, rejected], share_prefix=True)
    assert pack_stats(batch).unshared_tokens - batch.num_tokens == 8


def test_strings_without_prompt_are_learned_whole(tmp_path, tokenizer):
    ((chosen, rejected),) = pairs(tmp_path, tokenizer, [{"chosen": "ab", "rejected": "ac"}])
    # Nothing is prompt, but the first token has no prediction.
    assert chosen.loss_mask.tolist() == rejected.loss_mask.tolist() == [False, True, True]
    assert (chosen.prompt_length, chosen.values["margin"]) == (0, 0.0)


@pytest.mark.parametrize("method", [SimPO, ORPO])
def test_what_whole_texts_share_is_their_prompt_where_it_does_not_cancel(tmp_path, tokenizer, method):
    """Losses of means: SimPO's reward is over the response given the prompt, and so are ORPO's odds and NLL."""
    config = parse(method, ["--pretrain", "m", "--dataset", "d"], method.command).config
    (tmp_path / "a.jsonl").write_text(json.dumps({"chosen": "Q:x A:b", "rejected": "Q:x A:cd"}))
    examples = config.load(RecordSpec(str(tmp_path / "a.jsonl")), tokenizer)
    ((chosen, rejected),) = examples
    assert parts(chosen, tokenizer) == "Q:x A:[b<|im_end|>]"
    assert parts(rejected, tokenizer) == "Q:x A:[cd<|im_end|>]"
    assert examples.learned().tolist() == [2, 3]
    assert any("counts as the prompt" in warning for warning in examples.report.warnings)
    batch = pack([chosen, rejected], share_prefix=False)
    if method is SimPO:  # rewards 2 x mean, with a difference of log 3, and no margin
        outputs = Outputs(double(0, -2 * LOG2, -3 * LOG2, -3 * LOG3 / 2, 0))
        assert summary(SimPOObjective(2.0, 0.0), outputs, batch)["loss"] == pytest.approx(math.log(4 / 3))
    else:  # odds 3 and 1
        outputs = Outputs(double(0, 2 * math.log(0.75), -LOG2, -LOG2, -LOG2))
        assert summary(ORPOObjective(0.5), outputs, batch)["loss"] == pytest.approx(1.5 * math.log(4 / 3))


def test_only_whole_texts_have_an_implicit_prompt(tmp_path, tokenizer):
    settings = {"prompt_key": "p", "implicit_prompt": True}
    ((chosen, rejected),) = pairs(tmp_path, tokenizer, [{"p": "q", "chosen": "ab", "rejected": "ac"}], **settings)
    assert (parts(chosen, tokenizer), parts(rejected, tokenizer)) == ("q[ab<|im_end|>]", "q[ac<|im_end|>]")


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize(
    ("row", "key"),
    [
        ({"chosen": GOOD, "rejected": BAD}, None),
        ({"p": HISTORY, "chosen": GOOD[1:], "rejected": BAD[1:]}, "p"),
        ({"p": "q", "chosen": "good", "rejected": "bad"}, "p"),
    ],
)
def test_pairs_of_chats(tmp_path, row, key, marked):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = MARKED if marked else tokenizer.chat_template
    ((chosen, rejected),) = pairs(tmp_path, tokenizer, [row], prompt_key=key, apply_chat_template=True)
    head = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert parts(chosen, tokenizer) == head + "[good<|im_end|>]"
    assert parts(rejected, tokenizer) == head + "[bad<|im_end|>]"
    assert chosen.prompt_length == rejected.prompt_length == 3 + 6 + 1 + 10


def test_a_merge_in_one_answer_only(tmp_path):
    tokenizer = merging_tokenizer(("Ġ", "y"))
    row = {"p": "hi", "chosen": "yes", "rejected": "no"}
    ((chosen, rejected),) = pairs(tmp_path, tokenizer, [row], prompt_key="p", input_template="{} A: ")
    # Shared is "hi A:"; both log-probabilities are of the text from the space on.
    assert chosen.prompt_length == rejected.prompt_length == 5
    assert parts(chosen, tokenizer) == "hi A:[ yes<|im_end|>]"
    assert parts(rejected, tokenizer) == "hi A:[ no<|im_end|>]"


def test_ties_and_empty_sides(tmp_path, tokenizer):
    fine = {"p": "x", "chosen": "a", "rejected": "b"}
    rows = [
        {**fine, "rejected": "a"},
        {**fine, "chosen": " "},
        {**fine, "p": None},
        fine,
        fine,
        fine,
    ]
    examples = pairs(tmp_path, tokenizer, rows, prompt_key="p", max_bad_rows=0.5)
    assert dict(examples.report.sources[0].dropped) == {"tie": 1, "empty answer": 1, "empty prompt": 1}
    chats = [{"chosen": GOOD, "rejected": GOOD}, {"chosen": GOOD[1:], "rejected": BAD[1:]}]
    rows = [*chats, *[{"chosen": GOOD, "rejected": BAD}] * 2]
    examples = pairs(tmp_path, tokenizer, rows, apply_chat_template=True, max_bad_rows=0.5)
    assert dict(examples.report.sources[0].dropped) == {"tie": 1, "empty prompt": 1}


def test_long_pairs(tmp_path, tokenizer):
    rows = [
        {"p": "12", "chosen": "34", "rejected": "345678"},
        {"p": "12", "chosen": "3456", "rejected": "34567"},
        {"p": "123456", "chosen": "a", "rejected": "b"},
    ]
    with pytest.raises(DataError, match=r"dropped: 3 too long; longest: 9 tokens"):
        pairs(tmp_path, tokenizer, rows, prompt_key="p", max_len=4)
    examples = pairs(tmp_path, tokenizer, rows, prompt_key="p", max_len=6, overlong=Overlong.TRUNCATE)
    # The first pair keeps an end token on its short side only; the second is equal after the cut, the third has no answer.
    ((chosen, rejected),) = examples
    assert (parts(chosen, tokenizer), parts(rejected, tokenizer)) == ("12[34<|im_end|>]", "12[3456]")
    assert dict(examples.report.sources[0].dropped) == {"equal when cut": 1, "nothing to learn left when cut": 1}
    assert examples.lengths().tolist() == [5 + 6]


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"chosen": "a"}, {}, r"^Line 2 of .* has no field 'rejected'; it has 'chosen'"),
        ({"chosen": "a", "rejected": "b"}, {"prompt_key": "p"}, r"^Line 2 of .* has no field 'p'"),
        ({"chosen": "a", "rejected": 3}, {}, r"^Line 2 of .*: the field 'rejected' is the number 3, not a string"),
        (
            {"chosen": "a", "rejected": "b", "margin": "big"},
            {"margin_loss": True},
            r"^Line 2 of .*: the field 'margin' is 'big', not a finite number",
        ),
        (
            {"chosen": "a", "rejected": "b", "margin": True},
            {"margin_loss": True},
            r"^Line 2 of .*: the field 'margin' is True",
        ),
        (
            {"chosen": "a", "rejected": "b", "margin": None},
            {"margin_loss": True},
            r"^Line 2 of .* has no 'margin', which --margin_loss needs",
        ),
        (
            {"chosen": "a", "rejected": "b"},
            {"apply_chat_template": True},
            r"^Line 2 of .*: the field 'chosen' is a string",
        ),
        (
            {"chosen": GOOD, "rejected": [{"role": "user", "content": "other"}, BAD[1]]},
            {"apply_chat_template": True},
            r"^Line 2 of .*: the conversations in 'chosen' and 'rejected' differ before their last message",
        ),
        (
            {"chosen": GOOD, "rejected": HISTORY},
            {"apply_chat_template": True},
            r"^Line 2 of .*: the field 'rejected' ends with a message of role 'user'",
        ),
        (
            {"p": "another", "chosen": GOOD, "rejected": BAD},
            {"apply_chat_template": True, "prompt_key": "p"},
            r"^Line 2 of .*: the conversation in 'chosen' does not begin with the prompt in 'p'",
        ),
    ],
)
def test_bad_pairs(tmp_path, tokenizer, row, settings, message):
    chat = "apply_chat_template" in settings
    fine = {
        "chosen": GOOD[1:] if "prompt_key" in settings else GOOD,
        "rejected": BAD[1:] if "prompt_key" in settings else BAD,
    }
    fine = {"p": "x", "margin": 1, **(fine if chat else {"chosen": "a", "rejected": "b"})}
    with pytest.raises(DataError, match=message):
        pairs(tmp_path, tokenizer, [fine, row], **settings)


def test_labelled_answers(tmp_path, tokenizer):
    labels = [True, 0, 1, False, "1", "0", 1.0, "True", "FALSE", " true", "false", "1.0", "0.0"]
    examples = unpaired(tmp_path, tokenizer, [{"q": "hi", "a": "ok", "label": label} for label in labels])
    assert [s.values["desirable"] for (s,) in examples] == [1, 0, 1, 0, 1, 0, 1, 1, 0, 1, 0, 1, 0]
    (sample,) = examples[0]
    assert parts(sample, tokenizer) == "hi[ok<|im_end|>]"
    assert sample.values["mismatched"] == 0.0
    for label in (2, -1, 0.5, "yes", "", "01", None, [1]):
        with pytest.raises(DataError, match=r"^Line 1 of .*: the field 'label' is .*: a label must be true or 1"):
            unpaired(tmp_path, tokenizer, [{"q": "hi", "a": "ok", "label": label}])
    with pytest.raises(DataError, match=r"^Line 1 of .* has no field 'label'"):
        unpaired(tmp_path, tokenizer, [{"q": "hi", "a": "ok"}])


@pytest.mark.parametrize("field", ["q", "a", "label"])
def test_nan_is_a_missing_value(tmp_path, tokenizer, field):
    row = {"q": "hi", "a": "ok", "label": 1} | {field: float("nan")}
    with pytest.raises(DataError) as caught:
        unpaired(tmp_path, tokenizer, [row])
    assert str(caught.value).startswith(
        f"Line 1 of {tmp_path}/a.jsonl: the field {field!r} is NaN, a missing value: fill it in or remove the row (the"
    )


@pytest.mark.parametrize("answer", ["ok", [{"role": "assistant", "content": "ok"}]])
def test_labelled_chats(tmp_path, tokenizer, answer):
    head = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    rows = [{"q": [{"role": "user", "content": "hi"}], "a": answer, "label": True}]
    ((sample,),) = unpaired(tmp_path, tokenizer, rows, apply_chat_template=True)
    assert parts(sample, tokenizer) == f"{head}[ok<|im_end|>]"
    conversation = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ok"}]
    whole = unpaired(tmp_path, tokenizer, [{"q": conversation, "label": 1}], apply_chat_template=True, output_key=None)
    assert whole[0][0].tokens.tolist() == sample.tokens.tolist()
    # Cut in the middle of the answer: no end token, which would teach to stop there.
    cut = unpaired(
        tmp_path, tokenizer, rows, apply_chat_template=True, max_len=len(sample.tokens) - 2, overlong=Overlong.TRUNCATE
    )
    assert parts(cut[0][0], tokenizer) == f"{head}[o]"


def test_prompts_without_samples(tmp_path, tokenizer):
    examples = unpaired(tmp_path, tokenizer, [{"q": q, "a": "ok", "label": 1} for q in ("ab", "ab", "abc")])
    for i, (sample,) in enumerate(examples):
        assert examples.prompt(i) == sample.tokens[: sample.prompt_length].astype(np.int32).tobytes()
    assert examples.prompt(0) == examples.prompt(1) != examples.prompt(2)


def test_mismatched_by_hand(tmp_path, tokenizer):
    rows = [{"q": "1234", "a": "a", "label": 1}, {"q": "5", "a": "bcd", "label": 0}]
    samples = [sample for (sample,) in unpaired(tmp_path, tokenizer, rows)]
    first, second = mismatched(samples, seed=0)
    # The longest row has six tokens ("1234a" and the end token): the first copy is cut to that.
    assert parts(first, tokenizer) == "1234[bc]"
    assert parts(second, tokenizer) == "5[a<|im_end|>]"
    assert [s.group_id for s in (first, second)] == ["0:0", "0:1"]
    assert [s.prompt_length for s in (first, second)] == [4, 1]
    assert dict(first.values) == dict(second.values) == {"desirable": 0.0, "mismatched": 1.0}
    # Rows and copies go into one batch, where a row and its copy have one prompt.
    batch = pack([*samples, first, second], share_prefix=True)
    assert batch.values["mismatched"].tolist() == [0, 0, 1, 1]
    assert pack_stats(batch).unshared_tokens - batch.num_tokens == 5


def test_mismatched_never_answers_its_own_prompt(tmp_path, tokenizer):
    # Six rows, two answers a prompt: the other answer to the same prompt is no mismatch either.
    rows = [{"q": q, "a": q + n, "label": 1} for q in "abc" for n in "12"]
    samples = [sample for (sample,) in unpaired(tmp_path, tokenizer, rows)]
    seen = set()
    for seed in range(40):
        for copy in mismatched(samples, seed):
            prompt, answer = parts(copy, tokenizer)[0], parts(copy, tokenizer)[2:4]
            assert answer[0] != prompt
            seen.add((prompt, answer))
    assert seen == {(q, r["a"]) for q in "abc" for r in rows if r["q"] != q}
    again = [copy.tokens.tolist() for copy in mismatched(samples, 3)]
    assert again == [copy.tokens.tolist() for copy in mismatched(samples, 3)]
    for few in (samples[:1], samples[:2]):
        with pytest.raises(DataError, match=rf"^A batch of {len(few)} rows has only one distinct prompt"):
            mismatched(few, 0)


def test_hard_steps(tmp_path, tokenizer):
    row = {"input": "a # b #", "label": ["+", "-"]}
    examples = steps(tmp_path, tokenizer, [row], reward_tokens=("+", "-", "?"))
    ((sample,),) = examples
    # No end token, and nothing but the placeholders is learned.
    assert parts(sample, tokenizer) == "a [#] b [#]"
    plus, minus, other = tokenizer("+-?")["input_ids"]
    np.testing.assert_array_equal(sample.streams["labels"][sample.loss_mask], [plus, minus])
    assert np.isnan(sample.streams["labels"][~sample.loss_mask]).all()
    assert sample.streams["labels"].dtype == np.float32
    assert (examples.labels.soft, examples.labels.reward_ids) == (False, (plus, minus, other))
    free = steps(tmp_path, tokenizer, [row])
    ((written,),) = steps(
        tmp_path, tokenizer, [row | {"label": '["+", "-"]'}], reward_tokens=("+", "-")
    )  # as in a CSV file
    np.testing.assert_array_equal(written.streams["labels"], sample.streams["labels"])
    assert (free.labels.soft, free.labels.reward_ids) == (False, None)


def test_labels_of_the_first_rows_may_be_bad(tmp_path, tokenizer):
    """Which kind of labels a set has is told by the first one that is any."""
    rows = [
        {"input": "a#", "label": "+"},
        {"other": 1},
        {"input": "a#", "label": [None]},
        {"input": "a#", "label": [0.5]},
    ]
    examples = steps(tmp_path, tokenizer, rows, reward_tokens=("+", "-"), max_bad_rows=0.75)
    assert examples.labels.soft and len(examples) == 1
    kinds = {"wrong type": 1, "missing field": 1, "wrong labels": 1}
    assert examples.report.faults.by_kind == kinds


def test_soft_steps(tmp_path, tokenizer):
    rows = [{"input": "a#b#", "label": "[0.25, 1]"}, {"input": "a#", "label": [True]}]
    examples = steps(tmp_path, tokenizer, rows, reward_tokens=("+", "-"))
    (first,), (second,) = examples
    assert first.streams["labels"][first.loss_mask].tolist() == [0.25, 1.0]
    assert second.streams["labels"][second.loss_mask].tolist() == [1.0]
    assert examples.labels.soft


def test_cut_steps_lose_their_labels(tmp_path, tokenizer):
    rows = [{"input": "a#b#", "label": ["+", "-"]}, {"input": "abc#", "label": ["-"]}, {"input": "", "label": []}]
    rows += [{"input": "abc", "label": []}]
    examples = steps(tmp_path, tokenizer, rows, max_len=3, overlong=Overlong.TRUNCATE, max_bad_rows=0.5)
    ((sample,),) = examples
    assert parts(sample, tokenizer) == "a[#]b"
    assert sample.streams["labels"][sample.loss_mask].tolist() == tokenizer("+")["input_ids"]
    assert dict(examples.report.sources[0].dropped) == {
        "nothing to learn left when cut": 1,
        "empty prompt": 1,
        "no steps": 1,
    }


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"label": []}, {}, r"^Line 2 of .* has no field 'input'"),
        *(
            (
                {"input": "a#", "label": label},
                {},
                r"^Line 2 of .*: the field 'label' is of type str, not a list: give one label for each placeholder, in a CSV "
                r'file as JSON \(\["\+", "-"\]\) ',
            )
            for label in ("+", "['+']", '["+"')
        ),
        ({"input": "a#", "label": '["+", "-"]'}, {}, r"^Line 2 of .* has 2 labels in 'label' for 1 placeholders '#'"),
        ({"input": "a#", "label": ["+", "-"]}, {}, r"^Line 2 of .* has 2 labels in 'label' for 1 placeholders '#'"),
        (
            {"input": ["a"], "label": ["+"]},
            {},
            r"^Line 2 of .*: the field 'input' is the list \['a'\], not a string: correct",
        ),
        ({"input": "a#", "label": ["good"]}, {}, r"^Line 2 of .*: label 0 'good' is 4 tokens"),
        ({"input": "a#", "label": [None]}, {}, r"^Line 2 of .*: label 0 is of type NoneType"),
        ({"input": "a#", "label": [0.5]}, {}, r"^Line 2 of .*: label 0 is 0.5, but earlier labels are tokens"),
        ({"input": "a#", "label": ["?"]}, {"reward_tokens": ("+", "-")}, r"label 0 is '\?', which is not among --rew"),
        ({"input": "# a", "label": ["+"]}, {}, r"^Line 2 of .* starts with a placeholder"),
        ({"input": "a#", "label": ["+"]}, {"placeholder_token": "ки"}, r"^--placeholder_token 'ки' is 4 tokens"),
        ({"input": "a#", "label": ["+"]}, {"reward_tokens": ("+", "no")}, r"^--reward_tokens 'no' is 2 tokens"),
    ],
)
def test_bad_steps(tmp_path, tokenizer, row, settings, message):
    with pytest.raises(DataError, match=message):
        steps(tmp_path, tokenizer, [{"input": "x#", "label": ["+"]}, row], **settings)


@pytest.mark.parametrize("tokens", [None, ("+",), ("+", "-", "?")])
def test_soft_labels_need_two_tokens(tmp_path, tokenizer, tokens):
    with pytest.raises(DataError, match=r"^The labels in 'label' are numbers, which need two tokens"):
        steps(tmp_path, tokenizer, [{"input": "a#", "label": [0.5]}], reward_tokens=tokens)


@pytest.mark.parametrize("label", [1.5, -0.1, float("nan")])
def test_soft_labels_are_probabilities(tmp_path, tokenizer, label):
    with pytest.raises(DataError, match=r"label 0 is .*must lie between 0 and 1"):
        steps(tmp_path, tokenizer, [{"input": "a#", "label": [label]}], reward_tokens=("+", "-"))


def test_a_placeholder_must_be_a_token_of_its_own(tmp_path):
    tokenizer = merging_tokenizer(("#", "#"), ("Ġ", "#"))
    # With the space before it, it is one token without other text.
    ((sample,),) = steps(tmp_path, tokenizer, [{"input": "a #", "label": ["+"]}])
    assert parts(sample, tokenizer) == "a[ #]"
    with pytest.raises(DataError, match=r"^Line 1 of .* has its placeholder 0 in the tokens '##', together with other"):
        steps(tmp_path, tokenizer, [{"input": "a##", "label": ["+", "+"]}])


@pytest.mark.skipif(not SMOL.is_dir(), reason=f"the real tokenizer is not in {SMOL} (set TOGI_CACHE)")
def test_real_tokenizer(tmp_path):
    tokenizer = load_tokenizer(str(SMOL), chat_template=None, trust_remote_code=False)
    row = {"p": "Is it?", "chosen": " No", "rejected": " Yes"}
    ((chosen, rejected),) = pairs(tmp_path, tokenizer, [row], prompt_key="p")
    assert parts(chosen, tokenizer) == "Is it?[ No<|im_end|>]"
    assert len(chosen.tokens) - chosen.prompt_length == 2
    assert rejected.tokens[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id != STOP


def test_two_reward_tokens_that_a_tokenizer_takes_for_one_are_refused():
    def folding(text, add_special_tokens):
        return {"input_ids": [{"#": 1, "yes": 2}.get(text.lower(), 3)]}

    spec = RecordSpec("", placeholder_token="#", reward_tokens=("yes", "Yes"))
    with pytest.raises(DataError, match="Two of --reward_tokens yes Yes are the same token"):
        step_labels(spec, "yes", folding)
    assert step_labels(dataclasses.replace(spec, reward_tokens=("Yes", "no")), "no", folding).reward_ids == (2, 3)
