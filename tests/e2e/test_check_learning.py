"""``togi check rl --sample_groups``: set-ups in which nothing or little would be learnt get the sentence that says why, and
good ones none.

The model is a chain (``tests.chain_model``): what it answers follows from the last character of a prompt.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests.chain_model import save_chain_model
from tests.example_scripts import SCRIPTS, commands
from tests.shared_data import shared_file
from tests.tiny import CHAT_TEMPLATE, tiny_config
from togi.cli.main import main
from togi.config.rl import RLConfig
from togi.run.check import local_reward
from togi.sample import FinishReason, Prompt, Rollout

HALF = {"1": 0.5, "2": 0.5}
CHAIN = {
    "=": HALF,  # one digit of two, then the end
    "(": {"7": 1.0},  # always the same
    "~": {"~": 1.0},  # never ends
    "a": {"a": 0.95, "<|im_end|>": 0.05},  # any length
    "!": {"<|im_end|>": 1.0},  # ends at once
    "\n": HALF,  # where a chat prompt ends
}
# In later turns this one writes something before an answer that a prompt for a new answer does not have.
DRIFTING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}<none>{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FUNCTION = "def reward_func(queries, prompts, labels, responses):\n"
REWARDS = {
    "right": "    return [float(r == str(a)) for r, a in zip(responses, labels)]\n",
    "zero": "    return [0.0] * len(queries)\n",
    "fails": "    assert len(responses[0]) > 9, 'too short'\n    return [1.0] * len(queries)\n",
    "silent": "    return [None if len(r) < 9 else 1.0 for r in responses]\n",
    "length": "    return [len(r) / 10 for r in responses]\n",
    "parts": "    right = [float(r == a) for r, a in zip(responses, labels)]\n"
    "    form = [float(r.startswith('<think>')) for r in responses]\n"
    "    return {'rewards': [a + b for a, b in zip(right, form)], 'extra_logs': {'format': form, 'right': right}}\n",
    "formed": "    right = [float(r == a) for r, a in zip(responses, labels)]\n"
    "    form = [float(r.isdigit()) for r in responses]\n"
    "    return {'rewards': [a + b for a, b in zip(right, form)], 'extra_logs': {'format': form}}\n",
}
# Prompts by the character that they end with; the answers wanted are 1 and 2 in turn.
ENDS = {"sums": "=", "same": "(", "mixed": "((((((==", "endless": "~", "lengths": "a", "empty": "!"}
EXAMPLES = {"check.sh"}
BASE = """
    --input_key prompt --label_key answer --rollout_engine transformers --advantage_estimator group_norm
    --n_samples_per_prompt 8 --rollout_batch_size 8 --train_batch_size 64 --prompt_max_len 64 --generate_max_len 8
    --init_kl_coef 0 --reward_workers 1 --sample_groups 8 --lr_scheduler constant
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A chain as a base model and as an instruct model, prompts and rewards; the working folder of these tests."""
    folder = tmp_path_factory.mktemp("learning")
    save_chain_model(folder / "base", CHAIN, chat_template=None)
    save_chain_model(folder / "chat", CHAIN, chat_template=CHAT_TEMPLATE)
    for name, ends in ENDS.items():
        rows = [{"prompt": f"{i} {ends[i % len(ends)]}", "answer": str(1 + i % 2), "nothing": ""} for i in range(8)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, body in REWARDS.items():
        (folder / f"{name}.py").write_text(FUNCTION + body)
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@dataclass(frozen=True)
class SetUp:
    """``flags`` follow those that all have and win. ``line`` is said; without ``stops`` the status is 0."""

    name: str
    flags: str
    line: str
    stops: bool = False


BROKEN = [
    SetUp(
        "a constant reward",
        "--prompt_data sums.jsonl --reward_func zero.py",
        "stops learning: The reward is 0 for all 64 answers, so that no answer is better than another: try the reward function "
        "on a right and on a wrong answer, and take prompts that the model solves sometimes.",
        stops=True,
    ),
    SetUp(
        "a reward that fails on real answers",
        "--prompt_data sums.jsonl --reward_func fails.py",
        "stops learning: The reward of 64 of 64 answers failed, and the run stops above a share of 0.1 of a rollout; the first: "
        "reward_func in fails.py raised AssertionError: too short",
        stops=True,
    ),
    SetUp(
        "a reward that abstains on real answers",
        "--prompt_data sums.jsonl --reward_func silent.py",
        "stops learning: The reward abstained on 64 of 64 answers, which are not trained on: return a number for each answer "
        "that is to count.",
        stops=True,
    ),
    SetUp(
        "the same answer again and again",
        "--prompt_data same.jsonl --reward_func length.py --generate_max_len 1",
        "stops learning: The reward is 0.1 for all 64 answers, so that no answer is better than another: try the reward function "
        "on a right and on a wrong answer, and take prompts that the model solves sometimes.",
        stops=True,
    ),
    SetUp(
        "rewards that differ between groups only",
        "--prompt_data same.jsonl --reward_func constant_by_label.py",
        "stops learning: In all 8 groups every answer has the same reward, and --advantage_estimator group_norm learns from "
        "differences within a group: let the reward depend on the answer, or raise --n_samples_per_prompt.",
        stops=True,
    ),
    SetUp(
        "most groups without variance",
        "--prompt_data mixed.jsonl --reward_func right.py",
        "warning: Only 2 of 8 groups have answers that differ in reward (0 to 1); in 6 of the others all are at 0, in 0 all at "
        "1: take prompts that are solved sometimes, or raise --n_samples_per_prompt.",
    ),
    SetUp(
        "all groups filtered away",
        "--prompt_data same.jsonl --reward_func right.py --dynamic_filtering",
        "stops learning: --dynamic_filtering leaves out all 8 groups, as none has a mean reward between 0 and 1: widen "
        "--dynamic_filtering_reward_range, or give prompts that are solved sometimes.",
        stops=True,
    ),
    SetUp(
        "answers that never end",
        "--prompt_data endless.jsonl --reward_func right.py",
        "warning: None of 64 answers ends in a stop token ('<|im_end|>'), all are cut at --generate_max_len 8: raise it, or take "
        "a model and a template whose answers end.",
        stops=True,
    ),
    SetUp(
        "empty answers",
        "--prompt_data empty.jsonl --reward_func right.py",
        "stops learning: 64 of 64 answers have no text, only special tokens or white space: check that prompts end where the "
        "model begins to answer (--apply_chat_template, --input_template).",
        stops=True,
    ),
    SetUp(
        "a format that nothing reaches",
        "--prompt_data sums.jsonl --reward_func parts.py",
        "note: The part 'format' of the reward is 0 for all 64 answers: nothing teaches to reach it, so show the form in the "
        "prompt or by supervised fine-tuning first, or reward steps towards it.",
    ),
    SetUp(
        "a reward of nothing but the length",
        "--prompt_data lengths.jsonl --reward_func length.py --generate_max_len 100",
        "so that long answers alone are learnt: let it depend on what they say.",
    ),
    SetUp(
        "a template that drifts",
        "--pretrain chat --apply_chat_template --tokenizer_chat_template @drift --prompt_data sums.jsonl --reward_func right.py",
        "warning: In 64 of 64 conversations with the answer the chat template does not continue its own prompt (it puts '<none>' "
        "before the answer): later turns and supervised rows are not what is trained here; give a --tokenizer_chat_template that "
        "does.",
    ),
    SetUp(
        "labels of the wrong field",
        "--prompt_data sums.jsonl --reward_func formed.py --label_key nothing",
        "warning: The field 'nothing' is empty in all 8 rows: name the field of the reference answers with --label_key.",
        stops=True,
    ),
    SetUp(
        "an instruct model without its template",
        "--pretrain chat --prompt_data sums.jsonl --reward_func right.py",
        "note: The tokenizer has a chat template and prompts are plain text: if this is an instruct model, add "
        "--apply_chat_template.",
    ),
]
GOOD = [
    SetUp(
        "sums, GRPO",
        "--prompt_data sums.jsonl --reward_func right.py",
        "fine: 8 of 8 groups have answers that differ in",
    ),
    SetUp(
        "a chat with a format that is reached, RLOO with filtering",
        "--pretrain chat --apply_chat_template --advantage_estimator rloo --dynamic_filtering "
        "--dynamic_filtering_reward_range 1 2 --prompt_data sums.jsonl --reward_func formed.py",
        "fine: 8 of 8 groups have answers that differ in reward (1 to 2).",
    ),
    SetUp(
        "one answer a prompt, PPO with a critic",
        "--advantage_estimator gae --n_samples_per_prompt 1 --train_batch_size 8 --prompt_data sums.jsonl --reward_func right.py",
        "fine: Rewards differ: 0 to 1 over 8 answers.",
    ),
]


def check(*flags: str) -> int:
    words = [DRIFTING if word == "@drift" else word for word in flags]
    return main(["check", "rl", "--pretrain", "base", *BASE.split(), *words])


@pytest.mark.parametrize("setup", BROKEN, ids=lambda setup: setup.name)
def test_what_stops_learning_is_said(files: Path, setup: SetUp, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "constant_by_label.py").write_text(FUNCTION + "    return [float(a) for a in labels]\n")
    status = check(*setup.flags.split())
    out, err = capsys.readouterr()
    assert setup.line in out
    assert status == (2 if setup.stops else 0)
    assert ("The run would not learn. " in err) == setup.stops
    assert ("ok: the run can start" in out) != setup.stops


@pytest.mark.parametrize("setup", GOOD, ids=lambda setup: setup.name)
def test_a_good_set_up_raises_no_alarm(files: Path, setup: SetUp, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(*setup.flags.split()) == 0
    out = capsys.readouterr().out
    assert setup.line in out
    alarms = [line for line in out.splitlines() if line.startswith(("warning:", "stops learning:", "note:"))]
    assert not alarms


def test_a_share_of_answers_that_are_cut(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of answers that go on with a probability of 0.95 a token, 0.95^20 = 36% have more than 20 tokens."""
    assert check("--prompt_data", "lengths.jsonl", "--reward_func", "length.py", "--generate_max_len", "20") == 0
    found = re.search(
        r"warning: (\d+) of 64 answers are cut at --generate_max_len 20 \(median", capsys.readouterr().out
    )
    assert found and 14 <= int(found[1]) <= 33


def test_a_real_model_raises_no_alarm_but_for_stories_that_go_on(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stories of a trained model, rewarded for saying a word."""
    model = shared_file("stories260k/config.json").parent
    rows = [{"prompt": f"Once upon a time, {who} was very", "answer": who} for who in ("Tim", "Lily")]
    (files / "stories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (files / "word.py").write_text(FUNCTION + "    return [min(4, r.count('was')) for r in responses]\n")
    flags = (
        f"--pretrain {model} --prompt_data stories.jsonl --reward_func word.py --sample_groups 2 --n_samples_per_prompt 4 "
        "--rollout_batch_size 2 --train_batch_size 8 --generate_max_len 400"
    )
    assert check(*flags.split()) == 0
    out = capsys.readouterr().out
    alarms = [line for line in out.splitlines() if line.startswith(("warning:", "stops learning:", "note:"))]
    assert all("are cut at --generate_max_len 400" in line for line in alarms)
    assert "fine: 2 of 2 groups have answers that differ in reward" in out


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            "--actor_learning_rate 0",
            "--actor_learning_rate 0 changes no weight: give a rate above 0, such as 1e-6.",
        ),
        (
            "--freezing_actor_steps 3 --advantage_estimator gae",
            "--freezing_actor_steps 3 freezes the actor on all 1 rollouts: lower it, or raise --num_episodes.",
        ),
    ],
    ids=["rate", "frozen"],
)
def test_settings_that_train_nothing_are_refused_without_sampling(
    files: Path, flags: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        check("--prompt_data", "sums.jsonl", "--reward_func", "right.py", "--sample_groups", "0", *flags.split()) == 2
    )
    out, err = capsys.readouterr()
    assert f"stops learning: {sentence}" in out and f"togi: The run would not learn. {sentence}" in err


def test_sampling_and_replaying_exclude_each_other(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check("--prompt_data", "sums.jsonl", "--replay", "runs/a") == 2
    sentence = "--sample_groups generates, and --replay reads what was generated: leave one of them out."
    assert capsys.readouterr().err == f"togi: {sentence}\n"


def test_the_example_script(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its words, run here with a model that answers 1 or 2, and twice over the few prompts: one update is all warm-up."""
    (command,) = commands(
        SCRIPTS / "check.sh",
        tmp_path,
        "--no_bf16",
        "--num_episodes",
        "2",
        MODEL=files / "chat",
        DATA=files / "sums.jsonl",
        TOGI_CACHE=tmp_path,
    )
    assert main(["check", "rl", *command.flags]) == 0
    out = capsys.readouterr().out
    assert (
        "reward: function says 0 (function 0, scores 0, correct 0, boxed 0) of the answer 'A trial answer: 42'" in out
    )
    assert "fine: 8 of 8 groups have answers that differ in reward (0 to 1).\n" in out
    assert not [line for line in out.splitlines() if line.startswith(("warning:", "stops learning:"))]


def test_a_local_reward_model_gives_what_transformers_gives(files: Path, tmp_path: Path) -> None:
    """The scalar at the last token, standardised with the numbers of its config, of two texts of different lengths."""
    torch.manual_seed(0)
    config = tiny_config("llama", num_labels=1, initializer_range=0.1)
    config.mean, config.std = 0.25, 2.0
    judge = AutoModelForSequenceClassification.from_config(config).eval()
    judge.save_pretrained(tmp_path / "judge")
    settings = RLConfig(pretrain="base", reward_pretrain=str(tmp_path / "judge"), normalize_reward=True)
    texts = [(1, 2, 3, 4), (1, 2, 5)]
    prompt = Prompt("p", (1, 2), "")
    group = [
        Rollout(
            prompt,
            "g",
            text[2:],
            (True,) * len(text[2:]),
            (0.0,) * len(text[2:]),
            "",
            FinishReason.STOP,
            (0,) * len(text[2:]),
        )
        for text in texts
    ]
    scores = asyncio.run(local_reward(settings, 0).score(group))
    for text, score in zip(texts, scores, strict=True):
        with torch.no_grad():
            expected = float(judge(torch.tensor([text])).logits[0, 0])
        assert score.value == pytest.approx((expected - 0.25) / 2, rel=1e-4, abs=1e-6)
        assert score.components == {"reward_model": score.value}
