"""Contradictions in the settings of filtering, length penalties and what else decides about samples and learners."""

from __future__ import annotations

import pytest

from togi.config.parse import parse
from togi.config.rl import RLConfig
from togi.config.rl_checks import check_rl
from togi.errors import ConfigError

NEEDED = ["--pretrain", "model", "--prompt_data", "data.jsonl", "--reward_func", "reward.py"]
GROUPS = "--advantage_estimator group_norm --n_samples_per_prompt 4"
CONTRADICTIONS = [
    (f"{GROUPS} --freezing_actor_steps 2", ["--freezing_actor_steps 2", "--advantage_estimator group_norm"]),
    ("--dynamic_filtering", ["--dynamic_filtering", "--n_samples_per_prompt"]),
    (f"{GROUPS} --dynamic_filtering --dynamic_filtering_reward_range 1 0", ["--dynamic_filtering_reward_range 1 0"]),
    ("--dynamic_filtering_reward_range 0.2 0.8", ["--dynamic_filtering_reward_range", "without --dynamic_filtering"]),
    ("--dynamic_filtering_max_generations 3", ["--dynamic_filtering_max_generations", "without --dynamic_filtering"]),
    ("--ema_beta 0.9", ["--ema_beta", "without --enable_ema"]),
    ("--enable_ema --ema_beta 1", ["--ema_beta 1", "less than 1"]),
    ("--ptx_coef 0.1", ["--ptx_coef", "without --pretrain_data"]),
    ("--pretrain_output_key y", ["--pretrain_output_key", "without --pretrain_data"]),
    ("--pretrain_data x --pretrain_max_len 20000", ["--pretrain_max_len 20000", "--max_tokens_per_gpu 16384"]),
    ("--overlong_penalty_factor 2", ["--overlong_penalty_factor", "--overlong_buffer_len"]),
    ("--overlong_buffer_len 2048", ["--overlong_buffer_len 2048", "--generate_max_len 1024"]),
    ("--stop_properly_penalty_coef 1.5", ["--stop_properly_penalty_coef 1.5", "at most 1"]),
]


@pytest.mark.parametrize(("flags", "words"), CONTRADICTIONS, ids=[flags for flags, _ in CONTRADICTIONS])
def test_contradictions_name_both_flags(flags: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        check_rl(parse(RLConfig, [*NEEDED, *flags.split()], "rl").config)
    assert all(word in str(error.value) for word in words), str(error.value)
