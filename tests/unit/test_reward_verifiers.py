"""The reward functions that come with Togi, called as a run calls them, on cases made by hand and on public data."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.rewards import scored
from tests.shared_data import shared_rows
from togi.config.choices import Verifier
from togi.config.parse import parse
from togi.config.rl import RLConfig
from togi.config.rl_checks import check_rl
from togi.errors import ConfigError, RewardError
from togi.reward.verifiers import json_schema
from togi.reward.verifiers import reasoning_gym as gym
from togi.reward.wire import Complaint
from togi.run import preflight
from togi.run.rewards import EarlyRewards, trial_prompts
from togi.sample import Outcome, Prompt


def values(name: str, texts: list[str], label: object, *flags: str) -> list[float]:
    scores = scored(["--reward_func", f"builtin:{name}", *flags], texts, label)
    assert [score.outcome for score in scores] == [Outcome.SCORE] * len(texts), scores[0].message
    return [score.value for score in scores]


def test_exact() -> None:
    assert values("exact", ["Paris", " Paris\n", "paris"], "Paris") == [1.0, 1.0, 0.0]
    assert values("exact", ["7", "a  b"], 7) == [1.0, 0.0]
    assert values("exact", ["True", "1"], True) == [1.0, 0.0]
    assert values("exact", ["0.00001", "1e-05"], 1e-05) == [1.0, 0.0]


@pytest.mark.parametrize("name", ["exact", "math"])
@pytest.mark.parametrize("label", [None, "", "  ", [1], {"a": 1}])
def test_a_label_that_no_response_can_be(name: str, label: object) -> None:
    pytest.importorskip("math_verify")
    (score,) = scored(["--reward_func", f"builtin:{name}"], ["x"], label)
    why = "is empty" if isinstance(label, str) else "is no text and no number"
    assert score.message == (
        f"builtin:{name} cannot use the label {label!r}: it {why} (scoring prompt 'p'); point --label_key at the answer field."
    )


def test_a_reward_is_tried_on_each_kind_of_label() -> None:
    labels = ["a", "b", "", 1, 2.5, [1], ["x"], [2], {"a": 1}, {"b": 1}, {"a": 2}]
    prompts = [Prompt(str(i), (1,), "q", label, "set") for i, label in enumerate(labels)]
    assert [prompt.id for prompt in trial_prompts(prompts)] == ["0", "2", "3", "4", "5", "6", "8", "9"]
    others = [Prompt("c", (1,), "q", "b", "set"), Prompt("d", (1,), "q", "b", "other")]
    assert [prompt.id for prompt in trial_prompts([prompts[0], *others])] == ["0", "d"]


def test_rewards_are_closed_whichever_fails() -> None:
    class Source:
        def __init__(self, fails: bool) -> None:
            self.fails, self.closed = fails, False

        async def close(self) -> None:
            self.closed = True
            if self.fails:
                raise OSError("no")

    rewards = EarlyRewards(parse(RLConfig, [], "rl").config, None)
    sources = [Source(False), Source(True), Source(False)]
    rewards.functions = dict(enumerate(sources))  # type: ignore[assignment]
    with pytest.raises(OSError, match="no"):
        asyncio.run(rewards.close())
    assert all(source.closed for source in sources)


def test_a_function_that_abstains_in_the_trial_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """A warning: it may judge the made-up answer. What a built-in one cannot use is the label, which is real."""

    def silent(queries, prompts, labels):  # type: ignore[no-untyped-def]
        return [None for _ in queries]

    rewards = EarlyRewards(parse(RLConfig, ["--n_samples_per_prompt", "2"], "rl").config, silent)

    async def tried() -> None:
        try:
            await rewards.check([Prompt("p", (1,), "q", "a", "set")], 2)
        finally:
            await rewards.close()

    asyncio.run(tried())
    assert "silent in " in caplog.text
    assert " abstained on every trial answer: what it returns None for is not trained on" in caplog.text


def test_format() -> None:
    texts = ["<think>a\nb</think>4", " <think></think>5\n", "<think>4", "4"]
    assert values("format", texts, "", "--format_regex", r"<think>.*</think>\d") == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("tokens", "linear", "cosine"), [(8, 1.0, 1.0), (6, 0.75, 0.853553), (12, 0.5, 0.5), (16, 0.0, 0.0), (99, 0.0, 0.0)]
)
def test_length(tokens: int, linear: float, cosine: float) -> None:
    flags = ["--reward_func", "builtin:length", "--length_target", "8", "--length_shape"]
    for shape, expected in (("linear", linear), ("cosine", cosine)):
        (score,) = scored([*flags, shape], ["a text"], None, tokens)
        assert score.value == pytest.approx(expected, abs=1e-6)


def test_json_schema() -> None:
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    texts = [
        '{"age": 3}',
        '{"age": "3"}',
        '```\n{"age": "no"}\n```\nor\n```json\n{"age": 3}\n```',
        "{}",
        "age 3",
        "[" * 100_000,
    ]
    assert values("json_schema", texts, schema) == [1.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    assert values("json_schema", texts[:2], json.dumps(schema)) == [1.0, 0.0]
    wrong = scored(["--reward_func", "builtin:json_schema"], ["{}"], {"type": "nothing"})
    assert wrong[0].outcome is Outcome.ERROR
    assert wrong[0].message == (
        "builtin:json_schema cannot use the label {'type': 'nothing'}: it is no JSON Schema ('nothing' is not valid under any "
        "of the given schemas) (scoring prompt 'p'); point --label_key at a field of schemas."
    )
    assert values("json_schema", ["NaN", "-Infinity", "1"], {"type": "number"}) == [0.0, 0.0, 1.0]
    # each bracket takes several frames of the validator
    assert values("json_schema", ["[" * 2000 + "]" * 2000, "[[]]"], {"items": {"$ref": "#"}}) == [0.0, 1.0]
    (text,) = scored(["--reward_func", "builtin:json_schema"], ["{}"], "7 apples")
    assert text.message.startswith(
        "builtin:json_schema cannot use the label '7 apples': it is no JSON Schema (Extra data"
    )


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        (5, "it is no object, true or false"),
        (None, "it is no object, true or false"),
        ('{"minimum": NaN}', "NaN is no JSON"),
        ({"$schema": 5}, "its $schema is no text"),
        ({"$ref": "http://x.y/z"}, "nothing is at its reference 'http://x.y/z'"),
        ({"items": {"$ref": "#/definitions/x"}}, "nothing is at its reference '/definitions/x'"),
        ({"x": {"not": {"$ref": "#/y"}}, "items": {"$ref": "#/x"}}, "nothing is at its reference '/y'"),
        ({"allOf": [{"$ref": "#"}]}, "it is nested, or refers to itself, without end"),
    ],
)
def test_labels_that_are_no_schema(label: object, reason: str) -> None:
    with pytest.raises(Complaint) as refusal:
        json_schema.reward_func([""], [""], [label])
    assert refusal.value.what.endswith(f"it is no JSON Schema ({reason})")


@pytest.mark.parametrize(
    "label",
    [
        True,
        "true",
        {},
        {"$ref": "http://json-schema.org/draft-07/schema#"},
        {"properties": {"$ref": {"enum": [{"$ref": "#/no"}]}}},
        {"$defs": {"x": {"$id": "a"}}, "$ref": "a"},
    ],
)
def test_labels_that_are_schemas(label: object) -> None:
    assert json_schema.reward_func([""], [""], [label]) == [None]


def test_math() -> None:
    pytest.importorskip("math_verify")
    texts = [
        r"so \boxed{\frac{1}{2}}",
        "the answer is 0.5",
        r"\boxed{1/2}",
        r"\boxed{2}",
        "no idea",
        r"\boxed{9^{9^{9^{9}}}}",
    ]
    assert values("math", texts, r"\frac{1}{2}") == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert values("math", [r"\boxed{18}"], "3 x 6 = 18\n#### 18") == [1.0]
    assert values("math", [r"$\boxed{x^2+2x+1}$"], "(x+1)^2") == [1.0]


def test_numbers_are_read_as_they_are_written_by_hand() -> None:
    pytest.importorskip("math_verify")
    plain = {1e-05: "0.00001", 1e16: "1" + "0" * 16, "1e20": "1" + "0" * 20, "-2.5E-3": "-0.0025", 72.0: "72"}
    plain |= {"5.": "5", "#### 1,000.": "1000", "$7$.": "7", -0.5: "-0.5", 10**30: "1" + "0" * 30}
    for label, answer in plain.items():
        assert values("math", [rf"\boxed{{{answer}}}", r"\boxed{3}"], label) == [1.0, 0.0], label


def test_every_label_of_math_is_checked_as_it_is_parsed() -> None:
    """Most labels are not parsed by the check: it must accept the same ones."""
    math = pytest.importorskip("togi.reward.verifiers.math")
    for label in (
        "5",
        r"$\frac{1}{2}$",
        r"so \boxed{4}",
        r"\text{Paris}",
        "{4}",
        "(1,2]",
        r"\alpha",
        "-x",
        r"\{1\}",
        "π",
    ):
        assert math.reward_func([""], [""], [label]) == [None]
        assert math.gold(label)
    for label in ("####", "$", "}", '"', r"\text{}", r"\boxed{4", r"so \boxed{}", float("nan"), None, [5]):
        with pytest.raises(Complaint) as refusal:
            math.reward_func(["", ""], ["", ""], ["5", label])
        assert refusal.value.index == 1


def test_math_without_an_answer_in_the_label_is_an_error() -> None:
    pytest.importorskip("math_verify")
    assert scored(["--reward_func", "builtin:math"], ["1"], "####")[0].message == (
        "builtin:math cannot use the label '####': it holds no answer (scoring prompt 'p'); point --label_key at the answer "
        "field."
    )


NEEDED = ["--pretrain", "m", "--prompt_data", "d.jsonl", "--reward_func"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["builtin:maths"], ["builtin:maths is not known", "builtin:math"]),
        (["builtin:format"], ["--format_regex", "builtin:format"]),
        (["builtin:exact", "--format_regex", "a"], ["--format_regex", "builtin:format"]),
        (["builtin:length"], ["--length_target", "builtin:length"]),
        (["builtin:exact", "--length_target", "9"], ["--length_target", "builtin:length"]),
        (["builtin:exact", "--length_shape", "cosine"], ["--length_shape", "builtin:length"]),
        (["builtin:format", "--format_regex", "("], ["--format_regex (", "not a regular expression"]),
    ],
)
def test_mistakes(flags: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        check_rl(parse(RLConfig, [*NEEDED, *flags], "rl").config)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_missing_package_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RewardError, match="builtin:math needs the package math_verify"):
        preflight.check_reward("builtin:math")
    preflight.check_reward("builtin:exact")
    assert Verifier.EXACT.package == ""


def test_reasoning_gym() -> None:
    pytest.importorskip("reasoning_gym")

    label = {"task": "countdown", "answer": "29 + 10 + 20", "metadata": {"numbers": [29, 20, 10], "target": 59}}

    def scores(*responses):
        return gym.reward_func([""] * len(responses), [""] * len(responses), [label] * len(responses), responses)

    assert scores("Let me see.\n20 + 10 + 29", "<answer>1</answer> or <answer>(29+20)+10</answer> ok") == [1.0, 1.0]
    assert scores("29 + 20 - 10", "29 + 30") == [0.05, 0.05]
    assert scores("", "9**9**9**9", "9* *9", "__import__('os')", "1" * 201) == [0.0] * 5
    with pytest.raises(Complaint, match="evaluates what the model wrote"):
        gym.score("[]", {**label, "task": "n_queens"})
    with pytest.raises(Complaint, match="is not an object"):
        gym.score("5", "5")


def gym_label(task: str) -> dict[str, object]:
    """A label as the module's recipe makes it, after its way through JSON."""
    row = pytest.importorskip("reasoning_gym").create_dataset(task, size=1, seed=3)[0]
    label = json.dumps({"task": task, "answer": row["answer"], "metadata": row["metadata"]})
    return dict(json.loads(label))


def test_a_verifier_that_raises_says_that_the_answer_is_wrong() -> None:
    wrong = {"prime_factorization": "foo", "boxnet": "[[]]", "game_of_life": "{}", "complex_arithmetic": "nan + 3i"}
    for task, answer in wrong.items():
        label = gym_label(task)
        assert gym.score(answer, label) == 0.0, task
        assert gym.reward_func([""], [""], [label]) == [None]  # and the label is in order
    assert gym.score("1e400", gym_label("coin_flip")) == 0.0


@pytest.mark.parametrize("task", ["arc_agi", "rearc"])
def test_grids_are_compared_after_their_way_through_json(task: str) -> None:
    label = gym_label(task)
    assert gym.score(str(label["answer"]), label) == 1.0
    assert gym.score("1 2\n3 4", label) == 0.05


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"task": "game_of_life_halting"}, "'game_of_life_halting': it names a task whose verifier scores '?' 1"),
        ({"task": "coin_flip", "answer": "0.234375"}, "'coin_flip': it names a task whose verifier scores '0' 1"),
        ({"task": "coin_toss"}, "'coin_toss': it names no task"),
        ({"task": ["coin_flip"]}, "it is not an object"),
        ({"task": "ab", "answer": ""}, "it has an empty answer to its task ab, which scores 0"),
        (
            {"task": "arc_agi", "answer": "1 2", "metadata": {"output": [[3, 4]]}},
            "it has an answer that its task arc_agi scores 0.05, not 1",
        ),
    ],
)
def test_labels_that_would_teach_nonsense_are_refused(change: dict[str, object], why: str) -> None:
    pytest.importorskip("reasoning_gym")
    label = {"task": "prime_factorization", "answer": "2 × 3", "metadata": {}}
    assert gym.reward_func([""], [""], [label]) == [None]
    with pytest.raises(Complaint) as refusal:
        gym.reward_func(["", ""], ["", ""], [label, label | change])
    assert why in refusal.value.what and refusal.value.index == 1


def test_zero_may_be_the_right_answer() -> None:
    pytest.importorskip("reasoning_gym")
    label = {"task": "coin_flip", "answer": "0.0", "metadata": {}}
    assert gym.reward_func([""], [""], [label]) == [None]


def test_reasoning_gym_agrees_with_the_reference_answers() -> None:
    pytest.importorskip("reasoning_gym")
    rows = shared_rows("reasoning_gym/test.jsonl")
    labels = [{"task": row["task"], "answer": row["target"], "metadata": row["metadata"]} for row in rows]
    targets = [row["target"] for row in rows]
    assert gym.reward_func(targets, targets, labels, targets) == [1.0] * len(rows)
