"""What a reward function may return and what is refused, value by value."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from togi.reward.wire import NO_INDEX, Complaint, checked


@pytest.mark.parametrize(
    "returned",
    [
        [1.0, 0.5, 0.0],
        (1, Fraction(1, 2), False),
        np.array([1.0, 0.5, 0.0], dtype=np.float32),
        torch.tensor([1.0, 0.5, 0.0]),
        torch.tensor([1.0, 0.5, 0.0], dtype=torch.bfloat16, requires_grad=True),
        [torch.tensor(1.0), np.float64(0.5), np.int64(0)],
        {"rewards": [1.0, 0.5, 0.0]},
        {"rewards": torch.tensor([1.0, 0.5, 0.0])},
    ],
)
def test_every_accepted_form_gives_the_same_numbers(returned):
    answer = checked(returned, 3)
    assert answer["rewards"] == [1.0, 0.5, 0.0]
    assert all(type(reward) is float for reward in answer["rewards"])
    assert answer.keys() == {"rewards"}


def test_none_abstains_and_zero_is_a_score():
    assert checked([0.0, None], 2)["rewards"] == [0.0, None]
    assert checked(np.array([0, None], dtype=object), 2)["rewards"] == [0.0, None]


def test_one_number_is_enough_for_one_query():
    assert checked(0.25, 1)["rewards"] == [0.25]
    assert checked(torch.tensor(0.25), 1)["rewards"] == [0.25]
    both = {"rewards": torch.tensor([0.25]), "scores": torch.tensor(1.0)}
    assert checked(both, 1) == {"rewards": [0.25], "scores": [1.0]}


def test_logs_per_sample_and_for_all_become_components():
    answer = checked({"rewards": [1, 2], "scores": [0, 1], "extra_logs": {"words": [7, None], "rate": 0.5}}, 2)
    logs = {"scores": [0.0, 1.0], "words": [7.0, None], "rate": [0.5, 0.5]}
    assert answer == {"rewards": [1.0, 2.0], **logs}


@pytest.mark.parametrize(
    ("returned", "what", "index"),
    [
        ([1.0], "returned 1 rewards for 2 queries", NO_INDEX),
        ([1.0, 2.0, 3.0], "returned 3 rewards for 2 queries", NO_INDEX),
        ([], "returned 0 rewards for 2 queries", NO_INDEX),
        (1.0, "returned a single number as rewards for 2 queries", NO_INDEX),
        (torch.tensor(1.0), "returned a single number as rewards for 2 queries", NO_INDEX),
        (None, "returned None as rewards", NO_INDEX),
        ("ok", "returned the string 'ok' as rewards", NO_INDEX),
        ((x for x in [1.0, 2.0]), "returned a value of type generator as rewards", NO_INDEX),
        ([0.0, math.nan], "returned nan in rewards", 1),
        ([math.inf, 0.0], "returned inf in rewards", 0),
        (torch.tensor([0.0, -math.inf]), "returned -inf in rewards", 1),
        ([0.0, 10**400], "returned inf in rewards", 1),
        ([0.0, "1.0"], "returned the string '1.0' in rewards", 1),
        ([0.0, [1.0]], "returned a value of type list in rewards", 1),
        (torch.zeros(2, 1), "returned a value of type list in rewards", 0),
        ([0.0, 1j], "returned a value of type complex in rewards", 1),
        ({"scores": [0.0, 1.0]}, "returned a dict with the keys ['scores']", NO_INDEX),
        ({"rewards": [0, 1], "acc": [0, 1]}, "returned a dict with the keys ['rewards', 'acc']", NO_INDEX),
        ({"rewards": [0.0]}, 'returned 1 "rewards" for 2 queries', NO_INDEX),
        ({"rewards": [0, 1], "scores": [0, math.nan]}, 'returned nan in "scores"', 1),
        ({"rewards": [0, 1], "extra_logs": [1]}, 'returned a value of type list as "extra_logs"', NO_INDEX),
        ({"rewards": [0, 1], "extra_logs": {"a": [1]}}, "returned 1 \"extra_logs\" 'a' for 2 queries", NO_INDEX),
        ({"rewards": [0, 1], "extra_logs": {"a": math.nan}}, "returned nan in \"extra_logs\" 'a'", NO_INDEX),
        ({"rewards": [0, 1], "extra_logs": {"scores": 1}}, "returned an entry 'scores' in \"extra_logs\"", NO_INDEX),
    ],
)
def test_everything_else_is_refused(returned, what, index):
    with pytest.raises(Complaint) as refusal:
        checked(returned, 2)
    assert refusal.value.what == what
    assert refusal.value.index == index
