"""Which samples a run trains on, end to end: filtered groups, length penalties, and going on from a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.e2e.test_rl_run import GRPO, HF, metrics, train, world

pytestmark = pytest.mark.alone

__all__ = ["world"]
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
    train(world, run, *flags)
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
