"""How togi iterate scores: the combination by hand, failures, what a resume does again, and the trial on real labels."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.scripted_server import lengths, serving
from tests.tiny import STOP, save_tiny_model, tiny_tokenizer
from togi.config.iterate import IterateConfig, check_iterate
from togi.config.parse import parse
from togi.errors import ConfigError, RewardError
from togi.run import iterate_scores
from togi.run.iterate import check
from togi.run.iterate_scores import score_rows, try_rewards
from togi.sample import Outcome, Rollout, Score

# Two prompts with two outputs each; the numbers of tokens are 2, 4, 6 and 8.
ROWS = [
    {"input": f"p{unit}", "output": "ab" * (1 + sample), "id": f"0:{unit}", "sample": sample, "finish_reason": "stop"}
    | {"label": {"is": unit}, "output_tokens": [1] * (1 + 4 * unit + 2 * sample) + [STOP]}
    for unit in range(2)
    for sample in range(2)
]
# Says what it was asked, and fails on the prompts that a file names.
FUNCTION = """
from pathlib import Path
HERE = Path(__file__).parent
def reward_func(queries, prompts, labels):
    with (HERE / "calls").open("a") as calls:
        calls.write(prompts[0] + "\\n")
    if prompts[0] in (HERE / "bad").read_text().split():
        raise ValueError("no answer to " + prompts[0])
    return [float(len(query) - len(prompt)) + label["is"] for query, prompt, label in zip(queries, prompts, labels)]
"""


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    (tmp_path / "reward.py").write_text(FUNCTION)
    (tmp_path / "bad").touch()
    (tmp_path / "calls").touch()
    (tmp_path / "prompts.jsonl").write_text('{"input": "a", "is": {"is": 0}}\n')
    words = f"--method rs --pretrain m --prompt_data {tmp_path}/prompts.jsonl --label_key is --run_dir r"
    return [*words.split(), "--reward_func", f"{tmp_path}/reward.py", "--reward_workers", "1"]


def config(flags: list[str], more: str = "") -> IterateConfig:
    parsed = parse(IterateConfig, [*flags, *more.split()], "iterate")
    check_iterate(parsed)
    return parsed.config


def scored(config: IterateConfig, path: Path, *models: list[float]) -> list[dict[str, object]]:
    asyncio.run(score_rows(config, ROWS, models, path))
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_models_and_functions_are_combined_by_their_weights(flags: list[str], tmp_path: Path) -> None:
    """(2 m + 1 f + 5 l) / 8: f is 2, 4, 3, 5; tokens 2, 4, 6, 8 of 8 give l = 0.25, 0.5, 0.75, 1."""
    more = f"--reward_func {tmp_path}/reward.py,builtin:length --length_target 8 --reward_pretrain rm"
    made = config(flags, f"{more} --reward_combine mean --reward_weights 2 1 5")
    rows = scored(made, tmp_path / "scored.jsonl", [1.0, 2.0, 3.0, 4.0])
    assert [row["reward"] for row in rows] == [
        (2 + 2 + 1.25) / 8,
        (4 + 4 + 2.5) / 8,
        (6 + 3 + 3.75) / 8,
        (8 + 5 + 5) / 8,
    ]
    assert [(row["id"], row["sample"]) for row in rows] == [("0:0", 0), ("0:0", 1), ("0:1", 0), ("0:1", 1)]
    assert not any("output_tokens" in row or "reward_error" in row for row in rows)


def test_a_server_gets_what_togi_rl_sends(flags: list[str], tmp_path: Path) -> None:
    """Responses with their end token as text."""
    save_tiny_model(tmp_path / "model")
    with serving(lengths) as script:
        place = flags.index("--reward_func")
        made = config(flags[:place] + flags[place + 2 :], f"--remote_rm_url {script.url} --pretrain {tmp_path}/model")
        rows = scored(made, tmp_path / "scored.jsonl")
    response = tiny_tokenizer().decode([1, STOP])
    assert sorted(body["query"][0] for body in script.bodies)[0] == f"p0{response}" != "p0"
    assert response.endswith("<|im_end|>")
    assert all(isinstance(row["reward"], float) for row in rows)


@pytest.mark.parametrize("more", ["--on_reward_error stop --max_reward_errors 1", "--max_reward_errors 0.4"])
def test_more_failures_than_allowed_stop_and_are_tried_again(flags: list[str], tmp_path: Path, more: str) -> None:
    """What was scored is not scored again, what failed is."""
    (tmp_path / "bad").write_text("p1")
    with pytest.raises(RewardError, match=r"2 of 4 samples failed.*no answer to p1"):
        scored(config(flags, more), tmp_path / "scored.jsonl")
    assert not (tmp_path / "scored.jsonl").exists()
    (tmp_path / "bad").write_text("")
    rows = scored(config(flags, more), tmp_path / "scored.jsonl")
    assert [row["reward"] for row in rows] == [2.0, 4.0, 3.0, 5.0]
    assert (tmp_path / "calls").read_text().split() == ["p0", "p1", "p1"]


def test_failures_within_the_limit_are_told(flags: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "bad").write_text("p1")
    rows = scored(config(flags, "--max_reward_errors 0.5"), tmp_path / "scored.jsonl")
    assert [row["reward"] for row in rows] == [2.0, 4.0, None, None]
    assert ["no answer to p1" in str(row.get("reward_error")) for row in rows] == [False, False, True, True]
    assert (
        "The reward of 2 of 4 outputs failed (--on_reward_error drop_group). The first: reward_func in" in caplog.text
    )


class Half:
    """Fails on the first output of each prompt."""

    async def score(self, group: Sequence[Rollout]) -> list[Score]:
        return [Score(Outcome.ERROR, message="no"), Score(Outcome.SCORE, 1.0)]


@pytest.mark.parametrize(("how", "second"), [("drop_group", None), ("drop_sample", 1.0)])
def test_an_error_takes_its_group_or_only_itself(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, second: float | None
) -> None:
    monkeypatch.setattr(iterate_scores, "combined", lambda *_: Half())
    made = config(flags, f"--max_reward_errors 0.5 --on_reward_error {how}")
    rows = scored(made, tmp_path / "scored.jsonl")
    assert [(row["reward"], row.get("reward_error")) for row in rows] == 2 * [(None, "no"), (second, None)]


def test_the_trial_has_the_first_row_of_each_kind_of_label(flags: list[str], tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model")
    made = config(flags, f"--pretrain {tmp_path}/model")
    asyncio.run(try_rewards(made))
    assert (tmp_path / "calls").read_text().split() == ["a"]
    with (tmp_path / "prompts.jsonl").open("a") as rows:
        rows.write('{"input": "b", "is": {"is": 1}}\n{"input": "c", "is": "four"}\n')
    with pytest.raises(RewardError, match=r"TypeError.*scoring prompt '0:2'"):
        asyncio.run(try_rewards(made))


def test_a_reward_model_that_is_too_short_is_refused_first(flags: list[str], tmp_path: Path) -> None:
    """60 + 4 tokens and the end token that an output cut off gets are one more than 64."""
    for name, positions in (("model", 128), ("rm", 64)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"max_position_embeddings": positions}))
        (tmp_path / name / "model.safetensors").touch()
    words = f"--pretrain {tmp_path}/model --reward_pretrain {tmp_path}/rm --rollout_engine transformers --max_len 64"
    parsed = parse(IterateConfig, [*flags, *f"{words} --prompt_max_len 60 --max_new_tokens 4".split()], "iterate")
    with pytest.raises(
        ConfigError, match=r"--max_new_tokens 4 \+ 1 end token is more than the 64 positions of .*rm: lower"
    ):
        check(parsed)
    fits = [*flags, *f"{words} --prompt_max_len 59 --max_new_tokens 4 --run_dir {tmp_path}/run".split()]
    check(parse(IterateConfig, fits, "iterate"))
