"""The pure parts of the speed comparison: lengths, texts, counts, operations, and the table."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path
from statistics import fmean, median

import pytest

from comparison.cases import CASES, Case, Kind
from comparison.machine import faster_precision
from comparison.processes import run_watched
from comparison.rows import Row, Spread, answer, lengths, make_rows, sorted_steps, text, words_of
from comparison.summary import Size, Steps, Work, fastest, flops, summarise, table
from pump import longest_responses, main
from togi.obs.rollout_store import SCHEMA, RolloutStore, Split

MACHINE = {"matmul_bf16_gflops": 200.0, "matmul_fp32_gflops": 100.0, "copy_gb_per_second": 10.0, "threads": 2}


def test_lengths_have_the_mean_the_spread_and_the_bounds() -> None:
    drawn = lengths(Spread(155, 1.0, 8, 1024), 200, random.Random(1))
    assert fmean(drawn) == pytest.approx(155, abs=1)
    # the median of a log-normal is mean / exp(sigma^2 / 2) = 94; cutting the tail moves it up a little
    assert 90 < median(drawn) < 105
    assert min(drawn) >= 8 and max(drawn) <= 1024
    assert drawn != sorted(drawn)
    assert lengths(Spread(128), 3, random.Random(1)) == [128, 128, 128]


def test_a_row_counts_its_prompt_once_for_each_answer() -> None:
    row = Row(10, (3, 5))
    assert row.tokens == 13 + 15
    assert row.squares == 13**2 + 15**2
    assert row.longest == 15


def test_rows_are_the_same_for_a_seed_and_sorted_inside_a_step_only() -> None:
    rows = make_rows(Spread(60, 0.35), Spread(126, 0.43), 2, 8, seed=3)
    assert rows == make_rows(Spread(60, 0.35), Spread(126, 0.43), 2, 8, seed=3)
    arranged = sorted_steps(rows, 4)
    for start in (0, 4):
        step = arranged[start : start + 4]
        assert sorted(step, key=rows.index) == rows[start : start + 4]
        assert [row.longest for row in step] == sorted(row.longest for row in step)


def test_words_are_tokens_with_a_space_and_without() -> None:
    assert words_of({"Ġabout", "about", "Ġonly", "Ġof", "of", "The", "ĠThe", "ĠThen"}) == ["about"]


def test_a_text_has_as_many_words_as_tokens_and_an_answer_leaves_one_for_the_end() -> None:
    rng = random.Random(0)
    assert len(text(["ab", "cd"], 7, rng).split(" ")) == 7
    made = answer(["ab", "cd"], 7, rng)
    assert made.startswith(" ") and len(made.split()) == 6


def test_operations_of_a_step() -> None:
    """By hand: 10 parameters x 4 tokens = 40; 2 layers x 3 wide x 16 = 96; 136 in all, 6 times, and 2 for a frozen forward."""
    assert flops(Size(10, 2, 3), Work(4, 16), frozen=0) == 6 * 136
    assert flops(Size(10, 2, 3), Work(4, 16), frozen=1) == 8 * 136


def test_what_ppo_costs_beside_its_update() -> None:
    """The reference forward, 2 a parameter and token; values 2, and the critic's update 6."""
    assert CASES["grpo_step"].forwards == 1
    assert CASES["ppo"].forwards == 1 + 1 + 3


def run(side: str, seconds: float) -> dict[str, object]:
    """Steps of 100 tokens: the first two are slow, the others take ``seconds``."""
    ends = (10.0, 60.0, 60.0 + seconds, 60.0 + 2 * seconds)
    steps = Steps(ends, 7.0, (2.0, 1.9, 1.8, 1.5), (1.0, 1.0, 1.0, 0.5), (Work(100, 0),) * 4)
    return summarise(side, "as is", steps, 2.0 if side == "togi" else 4.0, Size(10**8, 1, 1), 0).to_json()


def test_a_run_is_judged_by_its_steps_after_the_first_two() -> None:
    made = run("togi", 0.5)
    assert made["step_seconds"] == (50.0, 0.5, 0.5)
    assert made["tokens_per_second"] == 200
    # 6 x 10^8 x 100 in half a second
    assert made["gflops"] == pytest.approx(120)


def test_the_fastest_setting_is_one_that_is_allowed() -> None:
    runs = [
        {"side": "trl", "setting": name, "tokens_per_second": rate}
        for name, rate in (("a", 1.0), ("b", 3.0), ("c", 9.0))
    ]
    assert fastest(runs, "trl", {"a", "b"}) == "b"
    assert fastest(runs, "transformers", {"a", "b"}) is None


def test_the_table_takes_medians_and_gives_ratios() -> None:
    runs = [run("togi", 0.5), run("trl", 1.0), run("togi", 0.4), run("trl", 2.0), run("togi", 9.0), run("trl", 1.0)]
    lines = table("sft", runs, MACHINE, "bf16").splitlines()
    assert lines[2] == "| togi (as is) | 200 | 60 % | 2.00 | 7.0 | 2, 1.5 | 1, 0.5 | 3 |"
    assert lines[3] == "| trl (as is) | 100 | 30 % | 4.00 | 7.0 | 2, 1.5 | 1, 0.5 | 3 |"
    assert "togi / trl (as is): 2.00 x the tokens/s, 0.50 x the memory, 1.00 x the time to the first step" in lines


def test_sides_compute_in_the_precision_that_the_machine_is_faster_in() -> None:
    narrow = MACHINE | {"matmul_bf16_gflops": 18.0}
    assert (faster_precision(MACHINE), faster_precision(narrow)) == ("bf16", "fp32")
    lines = table("sft", [run("togi", 0.5)], narrow, "fp32").splitlines()
    # 6 x 10^8 x 100 in half a second of 100 GFLOP/s
    assert "of fp32 matmul" in lines[0] and "| 120 % |" in lines[2]


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_every_setting_that_is_called_best_is_there_and_fair(case: Case) -> None:
    for peer in case.peers:
        best = case.best_of(peer)
        assert best.same_precision
        assert best in case.choices(peer, 1)


def test_the_cases_have_the_lengths_that_they_are_named_after() -> None:
    assert {name: CASES[name].prompt.mean for name in ("grpo128", "grpo512")} == {"grpo128": 128, "grpo512": 512}
    assert CASES["dpo"].prompt.mean == 155 and CASES["dpo"].answer.mean == 170
    assert CASES["rm"].prompt == CASES["dpo"].prompt and CASES["grpo128"].kind is Kind.REPLAYED


def test_the_pump_of_a_stored_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Groups take as long as their longest response: 3 and 4 tokens in step 1, 5 in step 2; evaluations are left out."""
    store = RolloutStore(tmp_path / "rollouts")
    empty = dict.fromkeys(set(SCHEMA.names) - {"step", "split"})

    def rows(*groups: tuple[str, int]) -> list[dict[str, object]]:
        return [empty | {"group_id": name, "response_tokens": [1] * tokens} for name, tokens in groups]

    store.write(1, Split.TRAIN, rows(("a", 2), ("a", 3), ("b", 4), ("b", 1)))
    store.write(2, Split.TRAIN, rows(("a", 5)))
    store.write(2, Split.EVAL, rows(("a", 99)))
    assert longest_responses(tmp_path) == [3, 4, 5]
    main(["--run", str(tmp_path), "--seconds_per_token", "10", "--seeds", "1", "--steps", "20"])
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| capacity rule")]
    # the longest of 32 takes 50 s: a synchronous step 50 + 63
    assert float(lines[0][1]) == pytest.approx(113 / 63, rel=0.05)
    # No group is old here, so masking, waiting and dropping are one.
    main(["--run", str(tmp_path), "--seconds_per_token", "10", "--seeds", "1", "--steps", "20", "--staleness", "2"])
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| S 2")]
    assert [line[0] for line in lines] == ["| S 2, mask", "| S 2, wait", "| S 2, drop"]
    assert all(float(line[1]) == pytest.approx(113 / 63, rel=0.05) for line in lines)
    assert lines[0][5] == "6: 0.00%"


FORKS_AND_GROWS = """
import os, time
held = bytearray(100_000_000)
if os.fork() == 0:
    time.sleep(1)
    os._exit(0)
os.wait()
more = bytearray(60_000_000)
time.sleep(2)
"""


def test_a_fork_does_not_hide_what_comes_after_it(tmp_path: Path) -> None:
    """With its child the process looks like 200 MB, which it never is; its most are the 160 MB at the end."""
    watched = run_watched([sys.executable, "-c", FORKS_AND_GROWS], dict(os.environ), tmp_path, tmp_path / "output.txt")
    assert 0.160 < watched.peak_gb < 0.190
