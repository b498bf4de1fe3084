"""The environments of examples/, played directly: games that are won and lost by known moves, and answers that are no action."""

from __future__ import annotations

import json
import re
import sys
import time
from itertools import permutations
from typing import Any

import pytest

from tests.example_files import example


def played(game: Any, *actions: str) -> list[tuple[float | None, bool]]:
    """Reward and end of each turn."""
    return [game.step(action)[1:] for action in actions]


# ---- gymnasium ----


@pytest.fixture
def gymnasium_game() -> Any:
    game = example("environments", "gymnasium_games").Game()
    yield game
    game.close()


def test_frozen_lake_is_won_and_its_map_shows_the_player(gymnasium_game: Any) -> None:
    first = gymnasium_game.reset("FrozenLake-v1", seed=1, options={"is_slippery": False}, other="column")
    assert "[S]FFF\nFHFH\nFFFH\nHFFG" in first and "left, down, right or up" in first
    # Round the holes: two down, one right, one down, two right.
    assert gymnasium_game.step("I go down.\nDown.") == ("SFFF\n[F]HFH\nFFFH\nHFFG", 0.0, False)
    assert played(gymnasium_game, "down", "right", "down", "right") == [(0.0, False)] * 4
    assert gymnasium_game.step("right") == ("SFFF\nFHFH\nFFFH\nHFF[G]", 1.0, True)


def test_frozen_lake_is_lost_in_a_hole(gymnasium_game: Any) -> None:
    gymnasium_game.reset("FrozenLake-v1", options={"is_slippery": False})
    assert played(gymnasium_game, "right", "down") == [(0.0, False), (0.0, True)]


@pytest.mark.parametrize("action", ["", "  \n", "rightt", "left right", "right\nor so", "4", "-1"])
def test_what_is_no_action_moves_nothing_and_is_paid_nothing(gymnasium_game: Any, action: str) -> None:
    gymnasium_game.reset("FrozenLake-v1", options={"is_slippery": False})
    text, reward, is_over = gymnasium_game.step(action)
    assert (reward, is_over) == (None, False) and text.endswith("left, down, right or up.")
    assert gymnasium_game.step("right")[0] == "S[F]FF\nFHFH\nFFFH\nHFFG"


def test_the_cliff_costs_100_and_each_other_step_1(gymnasium_game: Any) -> None:
    gymnasium_game.reset("CliffWalking-v1")
    assert played(gymnasium_game, "right", "up") == [(-100.0, False), (-1.0, False)]
    steps = played(gymnasium_game, *["right"] * 11, "down")
    assert steps == [(-1.0, False)] * 11 + [(-1.0, True)]


def test_a_hand_of_blackjack_and_the_same_seed_again(gymnasium_game: Any) -> None:
    texts = []
    for _ in range(2):
        texts.append(gymnasium_game.reset("Blackjack-v1", seed=3))
        texts += [gymnasium_game.step(action) for action in ("hit", "stick")]
    assert texts[:3] == texts[3:]
    # By this seed: 7, then a 10, and the dealer, who shows a 10, has more than 17.
    assert "You have 7. The dealer shows 10." in texts[0]
    assert texts[1:3] == [
        ("You have 17. The dealer shows 10.", 0.0, False),
        ("You have 17. The dealer shows 10.", -1.0, True),
    ]


def test_a_game_ends_at_its_own_limit_and_one_without_words_is_played_by_numbers(gymnasium_game: Any) -> None:
    first = gymnasium_game.reset("CartPole-v1", seed=3, options={"max_episode_steps": 2})
    assert first.startswith("This is CartPole-v1.") and first.endswith("0 or 1.")
    assert played(gymnasium_game, "1", "0") == [(1.0, False), (1.0, True)]


def test_a_game_without_a_list_of_actions_is_refused(gymnasium_game: Any) -> None:
    with pytest.raises(ValueError, match="choose a game with discrete actions"):
        gymnasium_game.reset("Pendulum-v1")


# ---- TextArena ----


@pytest.fixture
def textarena_game() -> Any:
    return example("environments", "textarena_games").Game()


def test_a_number_is_guessed_by_halves(textarena_game: Any) -> None:
    assert "between 1 and 20 within 10 turns" in textarena_game.reset("GuessTheNumber-v0", seed=3, other=1)
    low, high = 1, 20
    for _ in range(5):
        middle = (low + high) // 2
        text, reward, is_over = textarena_game.step(f"I say [{middle}].")
        if is_over:
            break
        assert reward is None and text in ("The target number is higher.", "The target number is lower.")
        low, high = (middle + 1, high) if "higher" in text else (low, middle - 1)
    assert (reward, is_over) == (1.0, True) and "You guessed the correct number" in text


def test_the_second_faulty_move_in_a_row_loses(textarena_game: Any) -> None:
    textarena_game.reset("GuessTheNumber-v0", seed=3)
    assert played(textarena_game, "ten", "[10]", "[10]") == [(None, False)] * 3
    text, reward, is_over = textarena_game.step("[21]")
    # The number is 8, and the last guess 2 of 19 beside it.
    assert is_over and text.startswith("Invalid Move") and reward == pytest.approx(1 - 2 / 19)


def test_a_code_is_broken_by_what_the_pegs_say(textarena_game: Any) -> None:
    textarena_game.reset("Mastermind-v0", seed=3)
    possible, turns = list(permutations(range(1, 7), 4)), 0
    while True:
        guess, turns = possible[0], turns + 1
        text, reward, is_over = textarena_game.step(f"[{' '.join(map(str, guess))}]")
        if is_over:
            break
        black, white = map(int, re.findall(r"(\d) \w+ peg", text))
        possible = [code for code in possible if pegs(code, guess) == (black, white)]
    assert reward == 1.0 and 2 <= turns <= 8 and "cracked the code" in text


def pegs(code: tuple[int, ...], guess: tuple[int, ...]) -> tuple[int, int]:
    black = sum(a == b for a, b in zip(code, guess, strict=True))
    return black, len(set(code) & set(guess)) - black


def test_the_tower_is_moved_in_the_fewest_moves(textarena_game: Any) -> None:
    textarena_game.reset("TowerOfHanoi-v0", seed=0)
    moves = ["[A C]", "[A B]", "[C B]", "[A C]", "[B A]", "[B C]", "[A C]"]
    assert played(textarena_game, *moves) == [(None, False)] * 6 + [(1.0, True)]


def test_a_game_for_two_is_refused(textarena_game: Any) -> None:
    with pytest.raises(ValueError, match="TicTacToe-v0 cannot be played alone"):
        textarena_game.reset("TicTacToe-v0")


# ---- reasoning-gym ----


@pytest.fixture
def reasoning_task() -> Any:
    return example("environments", "reasoning_tasks").Task()


SUM = {"task": "chain_sum", "seed": 7, "options": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}


def right_sum(question: str) -> int:
    left, sign, right = question.partition("=")[0].split()[-3:]
    return int(left) + int(right) if sign == "+" else int(left) - int(right)


def test_an_answer_may_be_corrected(reasoning_task: Any) -> None:
    question = reasoning_task.reset(**SUM, tries=3, other=1)
    answer = right_sum(question)
    assert question.endswith("You have 3 tries.")
    assert reasoning_task.step(f"<answer>{answer + 1}</answer>") == ("Wrong. Try again, 2 tries are left.", None, False)
    assert reasoning_task.step("") == ("Wrong. Try again, 1 try is left.", None, False)
    assert reasoning_task.step(f"It is\n<answer> {answer} </answer> I think.") == ("Right.", 1.0, True)


def test_a_single_turn_and_the_last_try_are_over_whatever_is_said(reasoning_task: Any) -> None:
    answer = right_sum(reasoning_task.reset(**SUM))
    text, reward, is_over = reasoning_task.step(f"<answer>{answer + 1}</answer>")
    assert (text, reward, is_over) == ("Wrong.", 0.0, True)
    reasoning_task.reset(**SUM)
    assert reasoning_task.step("") == ("Wrong.", 0.0, True)
    reasoning_task.reset(**SUM)
    assert reasoning_task.step(str(answer)) == ("Right.", 1.0, True)


# ---- Python in the sandbox ----


@pytest.fixture
def python_question() -> Any:
    question = example("environments", "python_tool").Question()
    question.reset("How many primes are below 20?", answer=8, other=1)
    return question


def test_programs_run_and_the_answer_is_judged(python_question: Any) -> None:
    assert python_question.reward() == 0.0
    code = "def prime(n):\n    return all(n % d for d in range(2, n))\nprint('counting')\nsum(map(prime, range(2, 20)))"
    assert python_question.python(code) == "counting\n8"
    assert not python_question.done
    python_question.answer(" 8 ")
    assert (python_question.done, python_question.reward()) == (True, 1.0)


def test_a_wrong_answer_gets_nothing(python_question: Any) -> None:
    python_question.answer("9")
    assert (python_question.done, python_question.reward()) == (True, 0.0)


@pytest.mark.parametrize(
    ("code", "ending"),
    [
        ("x", "NameError: name 'x' is not defined"),
        ("f = 1\nf / 0", "ZeroDivisionError: division by zero"),
        ("print('''a'''", "SyntaxError: '(' was never closed"),
        ("", "[The program printed nothing.]"),
        ("None", "[The program printed nothing.]"),
        ("import os\nos._exit(1)", "[The program was not finished: it met a limit or ended itself.]"),
    ],
)
def test_the_model_reads_what_went_wrong(python_question: Any, code: str, ending: str) -> None:
    text = python_question.python(code)
    assert text.endswith(ending) and "togi" not in text


def test_programs_know_nothing_of_each_other(python_question: Any) -> None:
    assert python_question.python("x = 1\nopen('/tmp/kept', 'w').write('a')") == "1"
    assert "NameError" in python_question.python("x")
    assert python_question.python("import os\nos.path.exists('/tmp/kept')") == "False"


def test_long_output_is_cut_in_the_middle_and_says_so(python_question: Any) -> None:
    text = python_question.python("print('a' * 3000 + 'b' * 3000)")
    assert text == f"{'a' * 2000}\n[... 2000 characters left out ...]\n{'b' * 2000}"


def test_a_program_that_takes_too_long_is_stopped(python_question: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = example("environments", "python_tool")
    monkeypatch.setattr(module, "LIMITS", module.Limits(wall_seconds=0.5))
    start = time.monotonic()
    text = python_question.python("print('begun', flush=True)\nwhile True: pass")
    assert text == "begun\n[The program was not finished: it took longer than 0.5 s.]"
    assert time.monotonic() - start < 5


# ---- packages that are not there, and rows ----


@pytest.mark.parametrize(
    ("name", "package", "command"),
    [
        ("gymnasium_games", "gymnasium", "pip install gymnasium"),
        ("textarena_games", "textarena", "pip install textarena"),
        ("reasoning_tasks", "reasoning_gym", "pip install reasoning-gym"),
        ("mcp_tools", "mcp", "pip install 'mcp>=2'"),
        ("openenv_game", "websockets.sync.client", "pip install websockets"),
    ],
)
def test_a_missing_package_is_one_sentence(
    name: str, package: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ImportError) as raised:
        example("environments", name)
    assert str(raised.value).endswith(command) and "\n" not in str(raised.value)
    monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.parametrize(
    ("name", "arguments", "class_name"),
    [
        ("gymnasium_games", ("FrozenLake-v1", "2", '{"is_slippery": false}'), "Game"),
        ("textarena_games", ("1", "GuessTheNumber-v0", "TowerOfHanoi-v0"), "Game"),
        ("reasoning_tasks", ("1", "3", "chain_sum", "spell_backward"), "Task"),
    ],
)
def test_the_rows_that_an_example_prints_can_be_played(
    name: str, arguments: tuple[str, ...], class_name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    module = example("environments", name)
    module.main(*arguments)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 2 and rows[0] != rows[1]
    for row in rows:
        assert getattr(module, class_name)().reset(**row)
