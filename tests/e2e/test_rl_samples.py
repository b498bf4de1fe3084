"""Which samples a run trains on, end to end: filtered groups, length penalties, and going on from a checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.learn_tools import max_difference
from tests.rl_world import GRPO, HF, example, metrics, model_bytes, train
from tests.tiny import tiny_config
from togi.cli.main import main
from togi.run.plan import EpochPlan

EXAMPLES = {"rl_ppo_warmup.sh", "rl_mixed.sh"}
# Of every third prompt all responses are right; the others' first response is wrong.
SOLVED = """
def reward_func(queries, prompts, labels, finish_reasons):
    assert len(set(prompts)) == 1
    solved = int(prompts[0].split("number ")[1].split("<")[0]) % 3 == 0
    return [1.0 if solved or place > 0 else 0.0 for place in range(len(queries))]
"""


def stored(run: Path) -> list[dict[str, object]]:
    """All training rollouts of a run, in order."""
    return [
        row for file in sorted((run / "rollouts").glob("step_*.parquet")) for row in pq.read_table(file).to_pylist()
    ]


def test_filtered_groups_are_replaced_and_stored_and_a_resumed_run_misses_none(world: Path, tmp_path: Path) -> None:
    """10 prompts, of which 0, 3, 6 and 9 are solved: six groups are trained, in rollouts of two, over two starts."""
    run, reward = tmp_path / "run", tmp_path / "solved.py"
    reward.write_text(SOLVED)
    flags = [*GRPO, *HF, "--reward_func", str(reward), "--rollout_batch_size", "2", "--train_batch_size", "8"]
    flags += ["--dynamic_filtering", "--overlong_buffer_len", "4", "--overlong_penalty_factor", "0.5"]
    flags += ["--stop_properly_penalty_coef", "-1", "--save_steps", "1", "--load_checkpoint"]
    done = train(world, run, *flags, "--max_steps", "1")
    assert "at most 1 rollouts" in done.stdout
    held_out = ["--eval_dataset", str(world / "prompts.jsonl"), "--eval_n_samples_per_prompt", "3"]
    train(world, run, *flags, *held_out, "--eval_temperature", "0")
    rows, records = stored(run), metrics(run)
    prompts = [row["prompt_id"] for row in rows[::4]]
    assert sorted(prompts) == sorted(f"0:{i}" for i in range(10))
    for row in rows:
        solved = int(str(row["prompt_id"]).removeprefix("0:")) % 3 == 0
        assert row["filtered"] == solved
        assert bool(row["advantages"]) == (not solved)
        parts, length = dict(row["components"]), len(row["response_tokens"])
        cut = row["finish_reason"] == "length"
        value = -1.0 if cut else parts["function"]
        assert parts["overlong_penalty"] == pytest.approx(-0.5 * max(0, length - 4) / 4)
        assert parts["stop_properly_penalty"] == pytest.approx(value - parts["function"])
        assert row["reward"] == pytest.approx(value + parts["overlong_penalty"])
    trained = [
        len({row["prompt_id"] for row in rows if row["step"] == r["step"] and not row["filtered"]}) for r in records
    ]
    assert sum(trained) == 6
    assert trained[:2] == [2, 2]
    for record in records:
        groups = {row["prompt_id"]: row["filtered"] for row in rows if row["step"] == record["step"]}
        assert record["values"]["groups/dropped_share"] == pytest.approx(sum(groups.values()) / len(groups))
        assert record["values"]["groups/generations"] == len(groups) / 2
    evaluated(run, {name: value for record in records for name, value in record["values"].items()})


def evaluated(run: Path, values: dict[str, float]) -> None:
    """Evaluation has settings of its own: greedy, three responses, every prompt, and rewards without penalties."""
    [file] = (run / "rollouts").glob("eval_*.parquet")
    rows = pq.read_table(file).to_pylist()
    assert [row["prompt_id"] for row in rows[::3]] == [f"0:{i}" for i in range(10)]
    for place in range(0, 30, 3):
        assert len({tuple(row["response_tokens"]) for row in rows[place : place + 3]}) == 1
    assert all(dict(row["components"]).keys() == {"function"} for row in rows)
    # four prompts of which all are right, six of which two of three are
    assert values["eval/default/pass1"] == pytest.approx((4 + 6 * 2 / 3) / 10)
    assert values["eval/default/pass2"] == pytest.approx(1)


def moved(run: Path, model: Path) -> float:
    """By how much the final actor differs from the model it started from."""
    return max_difference(*(load_file(folder / "model.safetensors") for folder in (run / "model", model)))


def same_run_from_checkpoint(run: Path, copy: Path, step: int) -> None:
    """A copy of ``run`` as it was when its checkpoint of ``step`` was the newest."""
    shutil.copytree(run, copy)
    for later in (copy / "checkpoints").glob("step_*"):
        if int(later.name.removeprefix("step_")) > step:
            shutil.rmtree(later)


def test_the_actor_is_frozen_for_exactly_n_rollouts_while_the_critic_learns(world: Path, tmp_path: Path) -> None:
    """Two of three rollouts; from the checkpoint of the second, the third is the same again, its learning rate too."""
    run, again = tmp_path / "run", tmp_path / "again"
    flags = [*HF, "--no_enforce_eager", "--actor_learning_rate", "1e-3", "--critic_learning_rate", "1e-3"]
    flags += ["--lambd", "1", "--lr_scheduler", "linear", "--lr_warmup_ratio", "0", "--train_batch_size", "4"]
    flags += ["--save_steps", "1", "--save_hf_ckpt", "--load_checkpoint", "--full_determinism"]
    example(world, run, "rl_ppo_warmup.sh", *flags)
    values = [record["values"] for record in metrics(run)]
    assert ["policy/loss" in each for each in values] == [False, False, True]
    assert all("value/loss" in each for each in values)
    # two updates are left for the actor, of the ten in all: its schedule starts at its first one
    assert values[2]["policy/lr"] == pytest.approx(1e-3 / 2)
    assert values[2]["value/lr"] == pytest.approx(1e-3 / 10)
    start = load_file(world / "model" / "model.safetensors")
    for step in (1, 2):
        saved = load_file(run / "checkpoints" / f"step_{step:08d}" / "hf" / "model.safetensors")
        assert max_difference(saved, start) == 0
    assert moved(run, world / "model") > 0
    same_run_from_checkpoint(run, again, step=2)
    example(world, again, "rl_ppo_warmup.sh", *flags)
    for role, model in (("actor", "model"), ("critic", "model_critic")):
        assert model_bytes(run / model) == model_bytes(again / model)
        words = [
            "export",
            "--run_dir",
            run,
            "--ckpt",
            run / "checkpoints",
            "--role",
            role,
            "--output_path",
            tmp_path / role,
        ]
        assert main([str(word) for word in words]) == 0
        assert model_bytes(tmp_path / role) == model_bytes(run / model)


def test_average_and_mixed_in_rows_go_on_after_a_resume(world: Path, tmp_path: Path) -> None:
    """One update a rollout, three rows of seven in each; from the checkpoint of the second all is the same bit for bit."""
    run, again, texts = tmp_path / "run", tmp_path / "again", tmp_path / "texts.jsonl"
    rows = [f"the {i}. thing to know" for i in range(7)]
    texts.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    flags = [*HF, "--ema_beta", "0.5", "--lr_warmup_ratio", "0", "--full_determinism", "--pretrain_batch_size", "3"]
    flags += ["--actor_learning_rate", "1e-3", "--ptx_coef", "0.5", "--save_steps", "1", "--load_checkpoint"]
    for folder in (run, again):
        example(world, folder, "rl_mixed.sh", *flags, "--no_enforce_eager", TEXTS=texts)
        if folder == run:
            same_run_from_checkpoint(run, again, step=2)
    for model in ("model", "model_ema"):
        assert model_bytes(run / model) == model_bytes(again / model)
    losses = [[record["values"]["ptx/loss"] for record in metrics(folder)] for folder in (run, again)]
    assert losses[0] == losses[1]
    first = EpochPlan(7, 3, epochs=1, seed=42).rows_of(0)
    assert losses[0][0] == pytest.approx(mean_nll(world / "model", [rows[row] for row in first]), abs=1e-5)
    ends = [load_file(folder / "model.safetensors") for folder in (run / "model_ema", run / "model", world / "model")]
    assert 0 < max_difference(ends[0], ends[1]) < max_difference(ends[1], ends[2])


def mean_nll(folder: Path, texts: list[str]) -> float:
    """Mean negative log-probability a token by plain Transformers; a text's first token has none."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            table = model(ids).logits[0, :-1].log_softmax(-1)
        total -= float(table.gather(1, ids[0, 1:, None]).sum())
        count += ids.shape[1] - 1
    return total / count


def test_a_critic_from_a_reward_model_two_epochs_a_rollout_and_two_episodes(world: Path, tmp_path: Path) -> None:
    """The critic's first values are the reward model's at every state, head and all, as plain Transformers has them."""
    torch.manual_seed(0)
    rewards = AutoModelForSequenceClassification.from_config(tiny_config("llama", num_labels=1, pad_token_id=0)).eval()
    rewards.save_pretrained(tmp_path / "rm")
    run = tmp_path / "run"
    flags = ["--advantage_estimator", "gae", "--init_kl_coef", "0", *HF, "--reward_pretrain", str(tmp_path / "rm")]
    flags += ["--critic_learning_rate", "0", "--lr_warmup_ratio", "0", "--save_value_network", "--save_steps", "6"]
    train(world, run, *flags, "--max_epochs", "2", "--num_episodes", "2")
    assert (
        max_difference(*(load_file(folder / "model.safetensors") for folder in (run / "model_critic", tmp_path / "rm")))
        == 0
    )
    rows, records = stored(run), metrics(run)
    values = []
    for row in (row for row in rows if row["step"] == 1):
        with torch.no_grad():
            hidden = rewards.model(torch.tensor([row["prompt_tokens"] + row["response_tokens"]])).last_hidden_state[0]
            values.append(rewards.score(hidden)[len(row["prompt_tokens"]) - 1 : -1, 0])
    assert records[0]["values"]["value/mean"] == pytest.approx(float(torch.cat(values).mean()), abs=1e-5)
    # 10 prompts: rollouts of 4, 4 and 2 in each episode, one update each in each of two epochs
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    episodes = [[row["prompt_id"] for row in rows[start : start + 40 : 4]] for start in (0, 40)]
    assert [sorted(ids) for ids in episodes] == [sorted(f"0:{i}" for i in range(10))] * 2
    assert episodes[0] != episodes[1]
    for role in ("actor", "critic"):
        learner = json.loads((run / "checkpoints" / "step_00000006" / role / "learner.json").read_text())
        assert learner["steps"] == 12
    assert all(record["values"]["policy/ppo_kl"] != 0 for record in records)  # the second epoch is off-policy
