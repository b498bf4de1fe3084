"""The example reward functions, on cases made by hand and, where TOGI_SHARED_DATA points at it, on public data."""

import asyncio
import importlib.util
from fractions import Fraction
from pathlib import Path

import pytest

from tests.shared_data import shared_rows
from togi.reward.function import CallLimits, FunctionReward
from togi.sample import FinishReason, Prompt, Rollout

FOLDER = Path(__file__).parents[2] / "examples" / "rewards"


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def score_in_worker(name, texts, labels, reason=FinishReason.STOP):
    async def run():
        reward = FunctionReward.from_file(FOLDER / f"{name}.py", CallLimits(workers=1))
        group = [
            Rollout(Prompt("p", (1,), "How many? 99 ", label), "g", (3,), (True,), (-1.0,), text, reason, (0,))
            for text, label in zip(texts, labels, strict=True)
        ]
        scores = await reward.score(group)
        await reward.close()
        return scores

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 2 + 3 = 5.", 5),
        ("A: 64", 64),
        ("<<66/3=22>>22 messages", 22),
        ("$1,234,567.50 in all", Fraction("1234567.5")),
        (r"\$80", 80),
        ("1,000 dollars", 1000),
        ("1,2,3", 3),
        ("12-5", 5),
        ("x = -5", -5),
        ("-$5", -5),
        ("$-5", -5),
        ("\u22127 degrees", -7),
        ("about .5", Fraction(1, 2)),
        ("50%", 50),
        ("3/4 of it", Fraction(3, 4)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        ("1/0", None),
        ("10{,}000", 10000),
        ("**18**", 18),
        ("none at all", None),
        ("", None),
    ],
)
def test_the_last_number_of_a_text(text, number):
    assert example("math_reward").last_number(text) == number


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{7} then \boxed{8", "7"),
        (r"} \boxed{3}", "3"),
        (r"\boxed{", None),
        ("no box", None),
    ],
)
def test_the_last_box_of_a_text(text, inside):
    assert example("math_reward").last_boxed(text) == inside


def test_math_reward():
    math_reward = example("math_reward")
    responses = [r"\boxed{72}, which is 3 days", "It is 72.00 hours", "71", "no idea", "1" * 5000]
    prompts = ["Q 72 "] * 5
    queries = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    labels = ["72", 72, "#### 72", "3 x 24 = <<3*24=72>>72\n#### 72", 72.0]
    returned = math_reward.reward_func(queries, prompts, labels)
    assert returned["rewards"] == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert returned["extra_logs"] == {"correct": [1.0, 1.0, 0.0, 0.0, 0.0], "boxed": [1.0, 0.0, 0.0, 0.0, 0.0]}
    math_reward.FORMAT_WEIGHT = 0.1
    assert math_reward.reward_func(queries, prompts, labels)["rewards"] == [1.1, 1.0, 0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="the label 'none' holds no number"):
        math_reward.reward_func(["Q 1"], ["Q "], ["none"])


def test_math_reward_in_a_worker():
    scores = score_in_worker("math_reward", ["18", "19"], ["18", "18"])
    assert [score.value for score in scores] == [1.0, 0.0]
    assert scores[0].components == {"function": 1.0, "scores": 1.0, "correct": 1.0, "boxed": 0.0}


def test_math_reward_agrees_with_the_reference_solutions_of_gsm8k():
    rows, reward_func = shared_rows("gsm8k/test.jsonl"), example("math_reward").reward_func
    returned = reward_func([row["solution"] for row in rows], [""] * len(rows), [row["target"] for row in rows])
    assert returned["rewards"] == [1.0] * len(rows)


def test_math_reward_agrees_with_the_judgements_of_model_solutions():
    rows, reward_func = shared_rows("gsm8k_solutions/unpaired_test.jsonl"), example("math_reward").reward_func
    returned = reward_func([row["completion"] for row in rows], [""] * len(rows), [row["target"] for row in rows])
    assert returned["rewards"] == [float(row["label"]) for row in rows]


def test_length_penalty():
    texts = ["w " * 100, "w " * 150, "w " * 500]
    scores = score_in_worker("length_penalty", texts, [""] * 3)
    assert [score.value for score in scores] == [0.0, -0.5, -1.0]
    assert [score.components["words"] for score in scores] == [100.0, 150.0, 500.0]
    assert [score.components["cut_off"] for score in scores] == [0.0] * 3
    cut = score_in_worker("length_penalty", ["short"], [""], FinishReason.LENGTH)[0]
    assert (cut.value, cut.components["cut_off"]) == (-1.0, 1.0)
