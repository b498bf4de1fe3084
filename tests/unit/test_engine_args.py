"""``--vllm_args``, fp8 rollouts and the memory of engines: what is taken, and what is refused with a way out."""

from __future__ import annotations

import pytest

from togi.config.parse import Source, parse
from togi.config.rl import RLConfig
from togi.config.rl_checks import check_rl
from togi.errors import ConfigError
from togi.plan.engine_args import check_extra_arguments, extra_arguments
from togi.plan.machine import Machine
from togi.plan.placement import resolve
from togi.rollout.engine import EngineSettings
from togi.rollout.vllm_engine import engine_arguments

BASE = ["--pretrain", "m", "--prompt_data", "p.jsonl", "--reward_func", "builtin:math", "--advantage_estimator"]
GROUP = [*BASE, "group_norm", "--n_samples_per_prompt", "2"]


def test_values_are_yaml_scalars() -> None:
    words = ["max_num_batched_tokens=8192", "swap=0.5", "async_scheduling=false", "load_format=auto", "seed_key=null"]
    assert extra_arguments(words) == {
        "max_num_batched_tokens": 8192,
        "swap": 0.5,
        "async_scheduling": False,
        "load_format": "auto",
        "seed_key": None,
    }
    assert extra_arguments(None) == {}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["max_num_batched_tokens"], "write each as name=value"),
        (["a=1", "a=2"], "sets a twice"),
        (["compilation_config={level: 3}"], "must be a single number"),
        (["max_num_batch_tokens=1"], "did you mean max_num_batched_tokens?"),
        (["gpu_memory_utilization=0.5"], "is set by Togi itself: use --vllm_gpu_memory_utilization."),
        (["logprobs_mode=raw_logprobs"], "is set by Togi itself: leave it out."),
    ],
)
def test_what_is_refused(words: list[str], said: str) -> None:
    pytest.importorskip("vllm")
    with pytest.raises(ConfigError) as error:
        check_extra_arguments(words)
    assert said in str(error.value)


def test_they_reach_the_engine_and_win_over_what_togi_only_chooses() -> None:
    settings = EngineSettings("m", extra={"max_num_batched_tokens": 777, "async_scheduling": False})
    for on_cpu in (True, False):
        arguments = engine_arguments(settings, on_cpu)
        assert (arguments["max_num_batched_tokens"], arguments["async_scheduling"]) == (777, False)


def test_weights_are_rounded_while_they_are_loaded() -> None:
    """vLLM's "fp8" itself is for weights that are stored in it, and refuses others."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    asked = engine_arguments(EngineSettings("m", quantization="fp8"), on_cpu=False)["quantization"]
    assert asked == "fp8_per_tensor" and asked in QUANTIZATION_METHODS
    assert engine_arguments(EngineSettings("m"), on_cpu=False)["quantization"] is None


@pytest.mark.parametrize("flag", ["--vllm_quantization fp8", "--vllm_kv_cache_dtype fp8"])
def test_rounded_rollouts_ask_for_a_correction_or_a_waiver(flag: str) -> None:
    with pytest.raises(ConfigError, match="add --enable_vllm_is_correction, or --allow_uncorrected_rollouts"):
        check_rl(parse(RLConfig, [*GROUP, *flag.split()], "rl").config)
    for way_out in ("--enable_vllm_is_correction", "--allow_uncorrected_rollouts"):
        check_rl(parse(RLConfig, [*GROUP, *flag.split(), way_out], "rl").config)
    with pytest.raises(ConfigError, match="needs --rollout_engine vllm"):
        words = [*GROUP, *flag.split(), "--enable_vllm_is_correction", "--rollout_engine", "transformers"]
        check_rl(parse(RLConfig, words, "rl").config)


def test_a_waiver_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="--allow_uncorrected_rollouts has no effect here"):
        check_rl(parse(RLConfig, [*GROUP, "--allow_uncorrected_rollouts"], "rl").config)


@pytest.mark.parametrize(
    ("flags", "share", "source"),
    [
        ("", 0.9, Source.AUTO),
        ("--colocate_all_models", 0.5, Source.AUTO),
        ("--workers local", 0.5, Source.AUTO),
        ("--colocate_all_models --vllm_gpu_memory_utilization 0.7", 0.7, Source.COMMAND_LINE),
    ],
)
def test_the_share_of_a_gpu_depends_on_who_else_is_there(flags: str, share: float, source: Source) -> None:
    resolved = resolve(parse(RLConfig, [*GROUP, *flags.split()], "rl"), Machine(8, 1 << 36, 8))
    assert resolved.config.vllm_gpu_memory_utilization == share
    assert resolved.sources["vllm_gpu_memory_utilization"] == source
