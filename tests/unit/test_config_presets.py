"""Named algorithms: what they set, that given settings win, what contradicts them, and where a run says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from togi.config.choices import Algo
from togi.config.fields import is_later
from togi.config.parse import Parsed, Source, build, parse
from togi.config.presets import PRESETS, describe
from togi.config.rl import RLConfig
from togi.config.rl_checks import check_rl
from togi.errors import ConfigError

NEEDED = ["--pretrain", "model", "--prompt_data", "data.jsonl", "--reward_func", "reward.py"]


def rl(*flags: str) -> Parsed[RLConfig]:
    return parse(RLConfig, [*NEEDED, *flags], "rl")


@pytest.mark.parametrize("algo", list(Algo))
def test_every_preset_is_sound_alone_and_without_a_kl(algo: Algo) -> None:
    check_rl(rl("--algo", algo).config)
    check_rl(rl("--algo", algo, "--init_kl_coef", "0").config)
    check_rl(rl("--algo", algo, "--policy_loss_type", "gspo").config)
    names = PRESETS[algo].settings
    assert not any(is_later(RLConfig, name) for name in names)
    assert "advantage_estimator" not in names


# algorithm: estimator, KL coefficient and estimator, whether it is in the loss, samples a prompt, aggregation, lambda
PUBLISHED = {
    "ppo": ("gae", 0.02, "k1", False, 1, "token_mean", 0.95),
    "reinforce++": ("reinforce", 0.01, "k1", False, 1, "token_mean", 1.0),
    "reinforce++-baseline": ("reinforce_baseline", 1e-5, "k2", True, 8, "token_mean", 1.0),
    "grpo": ("group_norm", 0.04, "k3", True, 64, "sequence_mean", 1.0),
    "rloo": ("rloo", 0.03, "k1", False, 4, "token_mean", 1.0),
    "dr_grpo": ("dr_grpo", 0.0, "k1", False, 8, "constant", 1.0),
    "dapo": ("group_norm", 0.0, "k1", False, 16, "token_mean", 1.0),
    "prorl": ("reinforce_baseline", 1e-4, "k2", True, 16, "token_mean", 1.0),
}


@pytest.mark.parametrize("algo", PUBLISHED)
def test_published_settings(algo: str) -> None:
    c = rl("--algo", algo).config
    found = (c.advantage_estimator, c.init_kl_coef, c.kl_estimator, c.use_kl_loss, c.n_samples_per_prompt)
    assert (*found, c.aggregation, c.lambd) == PUBLISHED[algo]


def test_the_two_with_filtering_and_length_penalties() -> None:
    dapo = rl("--algo", "dapo", "--generate_max_len", "500").config
    assert (dapo.clip_range, dapo.dynamic_filtering, dapo.lr_scheduler) == ((0.2, 0.28), True, "constant_with_warmup")
    assert (dapo.overlong_buffer_len, dapo.overlong_penalty_factor, dapo.stop_properly_penalty_coef) == (100, 1.0, None)
    assert rl("--algo", "dapo", "--overlong_buffer_len", "7", "--eps_clip", "0.1").config.clip_range == (0.1, 0.1)
    prorl = rl("--algo", "prorl").config
    assert (prorl.clip_range, prorl.dynamic_filtering, prorl.overlong_buffer_len) == ((0.2, 0.27), True, None)
    assert (prorl.stop_properly_penalty_coef, prorl.vllm_is_correction_type) == (0.0, "icepop")
    assert (prorl.enable_vllm_is_correction, prorl.vllm_is_truncated_threshold) == (True, (0.5, 5.0))
    check_rl(rl("--algo", "prorl", "--no_enable_vllm_is_correction", "--no_dynamic_filtering").config)


def test_what_is_given_wins_whatever_gives_it(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("algo: grpo\ninit_kl_coef: 0.01\n")
    parsed = rl("--config", str(file), "--n_samples_per_prompt", "4")
    config = parsed.config
    assert (config.init_kl_coef, config.n_samples_per_prompt, config.kl_estimator) == (0.01, 4, "k3")
    assert parsed.sources["init_kl_coef"] is Source.FILE
    assert parsed.sources["n_samples_per_prompt"] is Source.COMMAND_LINE
    assert parsed.sources["kl_estimator"] == "--algo grpo"
    assert parsed.sources["temperature"] is Source.DEFAULT
    by_code = build(RLConfig, {"algo": "grpo", "eps_clip": 0.1}, {"algo": Source.PYTHON, "eps_clip": Source.PYTHON})
    assert (by_code.config.eps_clip, by_code.sources["use_kl_loss"]) == (0.1, "--algo grpo")


def test_a_resolved_configuration_is_the_same_run(tmp_path: Path) -> None:
    """config.yaml of a run holds the algorithm and all that it set."""
    import yaml

    first = rl("--algo", "grpo", "--init_kl_coef", "0").config
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(first.model_dump(mode="json")))
    assert parse(RLConfig, ["--config", str(file)], "rl").config == first


def test_another_estimator_is_another_algorithm() -> None:
    rl("--algo", "grpo", "--advantage_estimator", "group_norm")
    with pytest.raises(ConfigError, match="--advantage_estimator rloo contradicts --algo grpo, which is group_norm"):
        rl("--algo", "grpo", "--advantage_estimator", "rloo")
    with pytest.raises(ConfigError, match=r"--algo gpro: must be .*'?grpo"):
        rl("--algo", "gpro")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--algo", "grpo", "--init_kl_coef", "0"], {"use_kl_loss": False, "kl_estimator": "k1"}),
        (["--algo", "grpo", "--no_use_kl_loss"], {"use_kl_loss": False, "kl_estimator": "k1", "init_kl_coef": 0.04}),
        (["--algo", "grpo", "--use_kl_loss"], {"use_kl_loss": True, "kl_estimator": "k3"}),
        (["--algo", "grpo", "--eps_clip_low_high", "0.1", "0.3"], {"clip_range": (0.1, 0.3)}),
        (["--algo", "grpo", "--policy_loss_type", "gspo"], {"loss_aggregation": "auto"}),
    ],
)
def test_values_that_would_contradict_what_is_given_are_left_out(flags: list[str], expected: dict[str, object]) -> None:
    config = rl(*flags).config
    check_rl(config)
    assert {name: getattr(config, name) for name in expected} == expected


def test_the_line_says_what_was_set_and_by_whom_it_was_published() -> None:
    parsed = rl("--algo", "dr_grpo", "--n_samples_per_prompt", "4")
    assert describe(Algo.DR_GRPO, parsed.values_from("--algo dr_grpo")) == (
        "--algo dr_grpo sets --actor_learning_rate 1e-06 --advantage_estimator dr_grpo --eps_clip 0.2 --loss_aggregation "
        "constant --init_kl_coef 0 (Liu et al. 2025, arXiv 2503.20783, table 6)"
    )
