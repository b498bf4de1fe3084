"""Episodes of a scripted policy in real processes of user classes: tokens, masks, scores, ends and failures."""

from __future__ import annotations

import asyncio
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.rl_world import ROOT
from tests.tiny import STOP, tiny_tokenizer
from togi.config.parse import parse
from togi.config.rl import RLConfig
from togi.errors import ConfigError, DataError, UserError
from togi.run.worlds import Worlds
from togi.sample import FinishReason, Generation, Outcome, Prompt, Rollout, Sampling

TOKENIZER = tiny_tokenizer()
CLASSES = '''
import os, time

class Sums:
    def reset(self, start: int, **row) -> str:
        self.total, self.calls = start, 0
        return f"Begin at {start}."

    def add(self, number: int) -> str:
        """Add a number.

        Args:
            number: What to add.
        """
        self.calls += 1
        if number == 13:
            raise ValueError("unlucky")
        if number == 99:
            time.sleep(60)
        if number == 77:
            os._exit(3)
        if number == 50:
            return "x" * 1000
        self.total += number
        self.done = self.total >= 10
        return str(self.total)

    def reward(self) -> dict[str, float]:
        return {"total": float(self.total), "calls": -0.1 * self.calls}


class Higher:
    """A game: a reward for each turn, and no reward of the whole."""

    def reset(self, number: int, **row) -> None:
        self.number, self.turns = number, 0

    def step(self, action: str):
        self.turns += 1
        if not action.isdigit():
            return "A number, please.", None, False
        found = int(action) == self.number
        return ("Right." if found else "Wrong."), (1.0 if found else -0.25), found
'''


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("worlds") / "worlds.py"
    path.write_text(textwrap.dedent(CLASSES))
    return path


def config(environment: str, *flags: str) -> RLConfig:
    fixed = ["--pretrain", "m", "--prompt_data", "p", "--apply_chat_template", "--environment", environment]
    return parse(RLConfig, [*fixed, "--prompt_max_len", "2000", "--generate_max_len", "200", *flags], "rl").config


def call(number: object) -> str:
    return f'<tool_call>\n{{"name": "add", "arguments": {{"number": {number}}}}}\n</tool_call>'


class Policy:
    """Says what is written, one text a turn; keeps what it was asked."""

    def __init__(self, *texts: str, version: int = 0) -> None:
        self.texts, self.asked, self.version = iter(texts), list[tuple[tuple[int, ...], Sampling]](), version

    async def __call__(self, context: Sequence[int], sampling: Sampling) -> Generation:
        self.asked.append((tuple(context), sampling))
        ids = TOKENIZER(next(self.texts), add_special_tokens=False)["input_ids"]
        whole = [*ids, STOP]
        cut = tuple(whole[: sampling.max_tokens])
        reason = FinishReason.STOP if len(cut) == len(whole) else FinishReason.LENGTH
        return Generation(cut, (-1.0,) * len(cut), reason, (self.version,) * len(cut))


def prompt(at: int = 0, /, **row: object) -> Prompt:
    return Prompt(f"0:{at}", (1,), "row", row=row, messages=tuple(row.pop("messages", ())))


def played(settings: RLConfig, row: Prompt, policy: Policy) -> Rollout:
    async def play() -> Rollout:
        worlds = Worlds(settings)
        try:
            await worlds.check([row], lambda prompt: f"Row {prompt.id}", TOKENIZER, [STOP])
            return await worlds.environment(Sampling(settings.generate_max_len)).run(row, "g", policy)
        finally:
            await worlds.close()

    return asyncio.run(play())


def text_of(ids: Sequence[int]) -> str:
    return TOKENIZER.decode(ids, clean_up_tokenization_spaces=False)


def sampled(rollout: Rollout) -> str:
    return text_of([t for t, own in zip(rollout.response_tokens, rollout.response_mask, strict=True) if own])


def test_an_episode_with_a_tool(file: Path) -> None:
    policy = Policy(call(4), call(6), version=2)
    rollout = played(config(f"{file}:Sums"), prompt(start=1), policy)
    assert rollout.score is not None
    assert (rollout.score.outcome, rollout.score.value) == (Outcome.SCORE, pytest.approx(11 - 0.2))
    assert rollout.score.components == {
        "environment": pytest.approx(10.8),
        "total": 11.0,
        "calls": pytest.approx(-0.2),
    }
    # Only what the policy has said is trained on; what was given lies between, and no token was written anew.
    assert sampled(rollout) == call(4) + "<|im_end|>" + call(6) + "<|im_end|>"
    assert (rollout.forks, rollout.response_text) == ((), f"{call(4)}\n{call(6)}")
    whole = rollout.prompt.tokens + rollout.response_tokens
    (first, _), (second, _) = policy.asked
    assert rollout.prompt.tokens == first and whole[: len(second)] == second
    assert "Begin at 1." in text_of(first) and '"number"' in text_of(first)  # the tools are told
    assert text_of(second).startswith(text_of(first) + call(4) + "<|im_end|>\n")
    assert "5" in text_of(second)[len(text_of(first) + call(4)) :]
    assert set(rollout.versions) == {2}
    roles = [message["role"] for message in rollout.messages]
    assert roles[-4:] == ["assistant", "tool", "assistant", "tool"]
    counts = {**rollout.counts}
    assert counts.pop("tool_seconds") > 0
    assert counts == {"turns": 2, "tool_calls": 2, "forks": 0, "failed": 0, "tool_errors": 0, "cut_observations": 0}


def test_an_answer_without_a_call_ends_the_episode(file: Path) -> None:
    rollout = played(config(f"{file}:Sums"), prompt(start=3), Policy(call(1), "Done."))
    assert rollout.score is not None and rollout.score.value == pytest.approx(4 - 0.1)
    assert (rollout.counts["turns"], rollout.finish_reason) == (2, FinishReason.STOP)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (call(13), "unlucky"),
        (call('"3"'), "number"),
        ('<tool_call>\n{"name": "subtract", "arguments": {}}\n</tool_call>', "subtract"),
        ('<tool_call>\n{"name": "add", "arguments": \n</tool_call>', ""),
    ],
    ids=["raised", "wrong type", "unknown tool", "malformed"],
)
def test_what_goes_wrong_in_a_call_is_told_to_the_model(file: Path, said: str, told: str) -> None:
    policy = Policy(said, "I give up.")
    rollout = played(config(f"{file}:Sums"), prompt(start=3), policy)
    assert rollout.score is not None and rollout.score.outcome is Outcome.SCORE
    assert rollout.counts["tool_errors"] == 1
    after = text_of(policy.asked[1][0]).partition(said)[2]
    assert told in after and len(after) > 60


@pytest.mark.parametrize(("number", "reason"), [(99, "ran longer than 1 s in add()"), (77, "exit code 3")])
def test_a_tool_that_hangs_or_dies_is_an_error_and_never_a_reward(file: Path, number: int, reason: str) -> None:
    rollout = played(
        config(f"{file}:Sums", "--max_tool_seconds", "1"), prompt(7, start=3), Policy(call(1), call(number))
    )
    assert rollout.score is not None and rollout.score.outcome is Outcome.ERROR
    assert reason in rollout.score.message and "'0:7'" in rollout.score.message
    assert (rollout.counts["failed"], rollout.counts["turns"]) == (1, 2)


def test_an_observation_that_is_too_long_is_cut_and_counted(file: Path) -> None:
    policy = Policy(call(50), "Done.")
    rollout = played(config(f"{file}:Sums", "--max_observation_chars", "100"), prompt(start=3), policy)
    assert rollout.counts["cut_observations"] == 1
    assert 50 <= text_of(policy.asked[1][0]).count("x") <= 110


def test_a_game_gives_rewards_by_turn(file: Path) -> None:
    row = prompt(number=3, messages=[{"role": "user", "content": "Find my number."}])
    policy = Policy("five", "5", "3")
    rollout = played(config(f"{file}:Higher"), row, policy)
    assert rollout.score is not None
    assert (rollout.score.value, rollout.score.components) == (0.75, {"environment": 0.75})
    # each after the last token of its turn, which is the end token
    ends = [
        place for place, token in enumerate(rollout.response_tokens) if token == STOP and rollout.response_mask[place]
    ]
    assert rollout.score.turns == ((ends[1], -0.25), (ends[2], 1.0))
    assert sampled(rollout) == "five<|im_end|>5<|im_end|>3<|im_end|>"
    assert "Find my number." in text_of(policy.asked[0][0]) and "A number, please." in text_of(policy.asked[1][0])


def test_turns_and_context_are_limits(file: Path) -> None:
    rollout = played(config(f"{file}:Sums", "--max_turns", "2"), prompt(start=-50), Policy(*[call(1)] * 5))
    assert (rollout.counts["turns"], rollout.finish_reason) == (2, FinishReason.LENGTH)
    # The second call needs more room than is left, and is cut.
    policy = Policy(*[call(1)] * 5)
    first = len(played(config(f"{file}:Sums"), prompt(start=-50), Policy("x")).prompt.tokens)
    limit = first + 150
    flags = ["--prompt_max_len", str(first), "--generate_max_len", "120", "--max_len", str(limit)]
    rollout = played(config(f"{file}:Sums", *flags), prompt(start=-50), policy)
    assert rollout.finish_reason is FinishReason.LENGTH
    assert len(rollout.prompt.tokens) + len(rollout.response_tokens) == limit
    assert policy.asked[0][1].max_tokens == 120


def test_each_row_acts_in_its_own_environment(file: Path) -> None:
    settings = config(f"sums={file}:Sums,guess={file}:Higher")
    row = prompt(environment="guess", number=4, start=1, messages=[{"role": "user", "content": "Find it."}])
    assert played(settings, row, Policy("4")).score == played(config(f"{file}:Higher"), row, Policy("4")).score
    with pytest.raises(DataError, match=r"Row 0:1 names 'chess', but --environment has sums, guess: name one of these"):
        played(settings, prompt(1, environment="chess"), Policy())
    with pytest.raises(DataError, match=r"Row 0:1 has no column 'environment'"):
        played(settings, prompt(1), Policy())


def mistakes() -> Iterator[tuple[str, Prompt, type[UserError], str]]:
    yield "Sums", prompt(), ConfigError, r"--environment Sums: .*start"  # reset() lacks a column
    yield "Higher", prompt(number=1), ConfigError, "returned nothing from reset"
    yield "Chess", prompt(), UserError, "Chess"


@pytest.mark.parametrize(("name", "row", "kind", "words"), mistakes())
def test_mistakes_show_before_anything_heavy(
    file: Path, name: str, row: Prompt, kind: type[UserError], words: str
) -> None:
    with pytest.raises(kind, match=words):
        played(config(f"{file}:{name}"), row, Policy())


def test_a_class_from_python(file: Path) -> None:
    class Echo:
        def reset(self, word: str) -> str:
            self.word, self.heard = word, ""
            return f"Say {word}."

        def say(self, text: str) -> str:
            """Say it.

            Args:
                text: The word.
            """
            self.heard = text
            return "Heard."

        def reward(self) -> float:
            return float(self.heard == self.word)

    from togi.config.parse import Source, over_file

    given: dict[str, object] = {"pretrain": "m", "prompt_data": "p", "apply_chat_template": True, "environment": Echo}
    settings = over_file(RLConfig, None, given, Source.PYTHON).config
    said = '<tool_call>\n{"name": "say", "arguments": {"text": "tea"}}\n</tool_call>'
    rollout = played(settings, prompt(word="tea"), Policy(said, "Done."))
    assert rollout.score is not None and rollout.score.value == 1.0


def blocks(page: Path) -> list[str]:
    """The indented code blocks of a page that define a class."""
    found = re.findall(r"(?:^    .*\n|^\n(?=    ))+", page.read_text(), re.MULTILINE)
    return [textwrap.dedent(block) for block in found if "class " in block]


QUIZ = '''
class Quiz:
    def reset(self, key: str) -> str:
        self.key = key
        return "Which?"

    def look(self, page: int) -> str:
        """Look.

        Args:
            page: A page.
        """
        return "nothing"

    def reward(self, answer: str) -> float:
        return float(self.key in answer)
'''


@pytest.mark.parametrize(("said", "value"), [("It is tea.", 1.0), ("It is milk.", 0.0)])
def test_a_reward_may_judge_the_last_answer(tmp_path: Path, said: str, value: float) -> None:
    (tmp_path / "quiz.py").write_text(QUIZ)
    rollout = played(config(f"{tmp_path}/quiz.py:Quiz"), prompt(key="tea"), Policy(said))
    assert rollout.score is not None and rollout.score.value == value


def test_the_classes_of_the_page_do_what_it_says(tmp_path: Path) -> None:
    sums, game = blocks(ROOT / "docs" / "environments.md")
    (tmp_path / "sums.py").write_text(sums)
    (tmp_path / "game.py").write_text(game)
    rollout = played(config(f"{tmp_path}/sums.py:Sums"), prompt(target=12), Policy(call(9), call(20), call(3)))
    assert rollout.score is not None
    assert (rollout.score.value, rollout.counts["tool_errors"], rollout.counts["turns"]) == (1.0, 1, 3)
    assert "the number must be from 1 to 9" in rollout.messages[-3]["content"]
    rollout = played(config(f"{tmp_path}/game.py:Higher"), prompt(number=6), Policy("x", "3", "6"))
    assert rollout.score is not None
    assert rollout.score.value == pytest.approx(0.8)
    assert [message["content"] for message in rollout.messages[-5::2]] == ["A number, please.", "Higher.", "Right."]


def test_the_example_finds_a_number(tmp_path: Path) -> None:
    place = f"{ROOT}/examples/environments/guess.py:Guess"
    guess = '<tool_call>\n{{"name": "guess", "arguments": {{"number": {}}}}}\n</tool_call>'
    rollout = played(config(place), prompt(number=7), Policy(guess.format(5), guess.format(7)))
    assert rollout.score is not None
    assert rollout.score.components == pytest.approx({"environment": 1.3, "found": 1.0, "near": 0.2, "saved": 0.1})
    rollout = played(config(place), prompt(number=7, guesses=1), Policy(guess.format(3)))
    assert rollout.score is not None and rollout.score.value == pytest.approx(0.1)
