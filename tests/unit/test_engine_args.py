"""``--vllm_args``, fp8 rollouts and the memory of engines: what is taken, and what is refused with a way out."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from tests.tiny import save_tiny_model
from togi.config.choices import EngineName
from togi.config.infer import InferConfig, check_infer
from togi.config.iterate import IterateConfig
from togi.config.parse import Source, parse
from togi.config.rl import RLConfig
from togi.config.rl_checks import check_rl
from togi.errors import ConfigError
from togi.methods.kd import KD
from togi.obs.progress import Progress
from togi.parallel.process import World
from togi.plan.engine_args import check_extra_arguments, extra_arguments
from togi.plan.machine import Machine
from togi.plan.placement import resolve
from togi.rollout import create_engine, vllm_engine
from togi.rollout.engine import EngineSettings
from togi.rollout.vllm_engine import engine_arguments
from togi.run import infer, iterate, offline_setup, preflight, start
from togi.run.iterate_steps import Steps
from togi.workers import session

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
        (["block_size=banana"], "block_size=banana: must be a whole number or null."),
        (["async_scheduling=1"], "async_scheduling=1: must be true or false or null."),
        (["watermark=high"], "watermark=high: must be a number."),
        (["revision=7"], "revision=7: must be text or null."),
        (["jit_monitor_mode=loud"], "jit_monitor_mode=loud: must be warn or error."),
        (["attention_backend=true"], "attention_backend=True: must be a word of vLLM's or null."),
        (["compilation_config=3"], "takes more than a single value: leave it out."),
        *(
            ([f"{name}=2"], f"{name} changes processes, devices, tokens, outputs or adapters")
            for name in (
                *(
                    "pipeline_parallel_size",
                    "data_parallel_size",
                    "data_parallel_backend",
                    "decode_context_parallel_size",
                ),
                *(
                    "runner",
                    "tokenizer",
                    "tokenizer_mode",
                    "worker_cls",
                    "scheduler_cls",
                    "enable_lora",
                    "max_lora_rank",
                ),
                *("nnodes", "device_ids"),
            )
        ),
    ],
)
def test_what_is_refused(words: list[str], said: str) -> None:
    pytest.importorskip("vllm")
    with pytest.raises(ConfigError) as error:
        check_extra_arguments(words)
    assert said in str(error.value)


def test_values_of_the_right_type_pass() -> None:
    pytest.importorskip("vllm")
    words = ["max_num_batched_tokens=8192", "block_size=null", "watermark=1", "attention_backend=FLASH_ATTN"]
    check_extra_arguments(
        [*words, "async_scheduling=false", "load_format=auto", "jit_monitor_mode=warn", "revision=main"]
    )


def test_what_vllm_itself_refuses_is_one_sentence(tmp_path: Path) -> None:
    """Its own configuration, which knows combinations: a batch below the longest sequence without chunked prefill."""
    pytest.importorskip("vllm")
    save_tiny_model(tmp_path)
    settings = EngineSettings(str(tmp_path), "float32", 64, extra={"max_num_batched_tokens": 32})
    with pytest.raises(ConfigError) as error:
        create_engine(EngineName.VLLM, settings)
    said = str(error.value)
    assert said.startswith("--vllm_args max_num_batched_tokens=32: vLLM does not start with it (")
    assert "max_num_batched_tokens (32)" in said and "max_model_len (64)" in said and "\n" not in said


@pytest.mark.parametrize(
    ("facts", "refused"),
    [
        ({"hidden_size": 64, "num_attention_heads": 4}, True),
        ({"hidden_size": 64, "num_attention_heads": 4, "head_dim": 32}, False),
        ({"hidden_size": 256, "num_attention_heads": 4}, False),
        ({"hidden_size": 256, "num_attention_heads": 4, "head_dim": None}, False),
        ({"head_dim": 48}, True),
        ({}, False),
    ],
)
def test_heads_that_vllm_cannot_take_on_a_cpu(facts: dict[str, object], refused: bool, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    (tmp_path / "config.json").write_text(json.dumps(facts))
    config = parse(InferConfig, [], "infer").config
    preflight.check_engine(EngineName.VLLM, config, str(tmp_path), False, Machine(8, 1 << 36, 1))
    preflight.check_engine(EngineName.TRANSFORMERS, config, str(tmp_path), False, Machine(8, 1 << 36, 0))
    with pytest.raises(ConfigError, match="--rollout_engine transformers") if refused else nullcontext():
        preflight.check_engine(EngineName.VLLM, config, str(tmp_path), False, Machine(8, 1 << 36, 0))


def test_a_resumed_run_draws_other_random_numbers() -> None:
    """A new one keeps its seeds, and no two engines or steps have the same."""
    config = resolve(parse(RLConfig, ["--pretrain", "m", "--seed", "7"], "rl"), Machine(8, 1 << 36, 8)).config
    seeds = {(step, i): session.engine_settings(config, i, 1, step).seed for step in range(50) for i in range(64)}
    assert [seeds[0, i] for i in range(3)] == [7, 8, 9] and len(set(seeds.values())) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds.values())
    assert 0 <= session.engine_settings(config, 0, 1, 10**6).seed < 2**32


def test_parts_of_a_list_are_added_up() -> None:
    words = ["--vllm_args", "a=1", "--vllm_args", "b=2", "c=3"]
    assert parse(RLConfig, words, "rl").config.vllm_args == ("a=1", "b=2", "c=3")
    assert parse(RLConfig, ["--target_modules", "q", "--target_modules", "k"], "rl").config.target_modules == ("q", "k")


def test_they_reach_the_engine_and_win_over_what_togi_only_chooses() -> None:
    settings = EngineSettings("m", extra={"max_num_batched_tokens": 777, "async_scheduling": False})
    for on_cpu in (True, False):
        arguments = engine_arguments(settings, on_cpu)
        assert (arguments["max_num_batched_tokens"], arguments["async_scheduling"]) == (777, False)


def test_no_kernel_is_built_for_a_sampler_that_gives_no_log_probs(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM would look for FlashInfer's sampler by default, and reads the variable when a model is loaded."""
    monkeypatch.setattr(os, "environ", {})
    vllm_engine._set_environment()
    from vllm import envs
    from vllm.v1.sample.ops.topk_topp_sampler import PROCESSED_LOGPROBS_MODES

    assert envs.environment_variables["VLLM_USE_FLASHINFER_SAMPLER"]() is False
    # the sampler is left out for these, so nothing is lost
    assert engine_arguments(EngineSettings("m"), on_cpu=False)["logprobs_mode"] in PROCESSED_LOGPROBS_MODES
    # the user's own word stays
    monkeypatch.setattr(os, "environ", {"VLLM_USE_FLASHINFER_SAMPLER": "1"})
    vllm_engine._set_environment()
    assert envs.environment_variables["VLLM_USE_FLASHINFER_SAMPLER"]() is True


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
    with pytest.raises(ConfigError, match="fp8 is vLLM's but --rollout_engine transformers"):
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


FP8 = ["--vllm_quantization", "fp8", "--vllm_kv_cache_dtype", "fp8"]
EVERY = ["--bf16", "--enforce_eager", *FP8, "--vllm_args", "max_num_batched_tokens=777", "async_scheduling=false"]


class Asked(Exception):
    """An engine was asked for, with these settings."""

    def __init__(self, name: EngineName, settings: EngineSettings) -> None:
        self.name, self.settings = name, settings


def by_infer(words: list[str], patch: pytest.MonkeyPatch) -> Asked:
    def create(name: EngineName, settings: EngineSettings) -> None:
        raise Asked(name, settings)

    parsed = parse(InferConfig, words, "infer")
    check_infer(parsed)
    patch.setattr(infer, "create_engine", create)
    patch.setattr("togi.run.loading.local_folder", str)
    patch.setattr(infer.chat, "stop_token_ids", lambda *_, **__: frozenset({0}))
    with pytest.raises(Asked) as asked:
        asyncio.run(infer._generate(parsed.config, None, [], [], None, Progress()))  # type: ignore[arg-type]
    return asked.value


def by_iterate(words: list[str], patch: pytest.MonkeyPatch, folder: Path) -> Asked:
    commands: list[Sequence[str]] = []
    config = parse(IterateConfig, words, "iterate").config
    Steps(config, folder, lambda _, argv: commands.append(argv))._ask(folder, [], "m", 1, 2, 1.0, told=False)
    return by_infer(list(commands[0]), patch)


def by_distillation(words: list[str], patch: pytest.MonkeyPatch) -> Asked:
    made: list[Asked] = []
    patch.setattr(offline_setup, "create_engine", lambda name, settings: made.append(Asked(name, settings)))
    patch.setattr("togi.run.loading.local_folder", str)
    config = parse(KD, words, "kd").config
    assert not list(config.problems(template_given=False))
    offline_setup.start_engines(config, World.solo(torch.device("cpu")))
    return made[0]


@pytest.mark.parametrize("command", ["infer", "iterate", "kd"])
def test_every_command_with_an_engine_passes_them_on(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if command == "infer":
        need = "--eval_task generate_vllm --pretrain m --dataset d.jsonl --output_path o.jsonl"
        asked = by_infer([*need.split(), *EVERY], monkeypatch)
    elif command == "iterate":
        need = "--method rs --pretrain m --prompt_data d.jsonl --run_dir r --reward_func f.py"
        asked = by_iterate([*need.split(), *EVERY], monkeypatch, tmp_path)
    else:
        need = "--pretrain m --teacher_model t --dataset d.jsonl --on_policy_share 1"
        asked = by_distillation([*need.split(), *EVERY], monkeypatch)
    assert asked.name is EngineName.VLLM
    arguments = engine_arguments(asked.settings, on_cpu=False)
    assert (arguments["quantization"], arguments["kv_cache_dtype"]) == ("fp8_per_tensor", "fp8")
    assert (arguments["max_num_batched_tokens"], arguments["async_scheduling"]) == (777, False)
    assert arguments["enforce_eager"] is True


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_rounds_limit_the_outputs_in_progress_of_both_engines(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = "--method rs --pretrain m --prompt_data d.jsonl --run_dir r --reward_func f.py --max_num_seqs 3"
    asked = by_iterate([*need.split(), "--rollout_engine", engine], monkeypatch, tmp_path)
    assert (asked.name, asked.settings.max_num_seqs) == (engine, 3)


@pytest.mark.parametrize(
    "flag",
    ["--vllm_quantization fp8", "--vllm_kv_cache_dtype fp8", "--vllm_args a=1", "--vllm_gpu_memory_utilization 0.5"],
)
def test_they_are_refused_where_vllm_does_not_generate(flag: str) -> None:
    infer_words = "--eval_task generate --pretrain m --dataset d.jsonl --output_path o.jsonl"
    with pytest.raises(ConfigError, match=f"{flag} is vLLM's but --eval_task generate"):
        check_infer(parse(InferConfig, [*infer_words.split(), *flag.split()], "infer"))
    kd_words = "--pretrain m --teacher_model t --dataset d.jsonl --on_policy_share 1 --rollout_engine transformers"
    problems = parse(KD, [*kd_words.split(), *flag.split()], "kd").config.problems(template_given=False)
    assert "is vLLM's but {rollout_engine} generates with Transformers" in next(problems)
    with pytest.raises(ConfigError, match=f"{flag} is vLLM's but --rollout_engine transformers"):
        check_rl(parse(RLConfig, [*GROUP, "--rollout_engine", "transformers", *flag.split()], "rl").config)
    with pytest.raises(ConfigError, match=f"{flag} is about engines, but --replay starts none"):
        words = [*GROUP, "--enable_vllm_is_correction", "--replay", "r", *flag.split()]
        check_rl(parse(RLConfig, words, "rl").config)


def test_an_engine_is_checked_before_it_starts() -> None:
    pytest.importorskip("vllm")
    infer_words = "--eval_task generate_vllm --pretrain m --dataset d.jsonl --output_path o.jsonl --vllm_args sed=1"
    with pytest.raises(ConfigError, match="sed is not an argument of the installed vLLM's engine: did you mean seed"):
        start.infer_door(parse(InferConfig, infer_words.split(), "infer"))
    config = parse(InferConfig, ["--bf16", *FP8], "infer").config
    preflight.check_engine(EngineName.VLLM, config, "m", True, Machine(8, 1 << 36, 1))
    with pytest.raises(ConfigError, match="--vllm_quantization fp8 needs GPUs"):
        preflight.check_engine(EngineName.VLLM, config, "m", True, Machine(8, 1 << 36, 0))
    # before what other flags would mend
    with pytest.raises(ConfigError, match="--vllm_kv_cache_dtype fp8 needs GPUs"):
        words = [*GROUP, "--vllm_kv_cache_dtype", "fp8"]
        preflight.check(parse(RLConfig, words, "rl"), Machine(8, 1 << 36, 0), reward_given=False)


@pytest.mark.parametrize("flag", ["vllm_quantization", "vllm_kv_cache_dtype"])
def test_fp8_without_bfloat16_is_refused_before_a_model_is_looked_for(
    flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vllm")
    said = f"--{flag} fp8 needs --bf16"
    node = Machine(8, 1 << 36, 8, bf16_gpus=True)
    monkeypatch.setattr(start, "this_machine", lambda: node)
    monkeypatch.setattr(iterate, "this_machine", lambda: node)
    monkeypatch.setattr(preflight, "this_machine", lambda: node)
    # a model that is not there would be the next to be refused, and is, where bfloat16 is left to the GPUs
    fp8 = [f"--{flag}", "fp8", "--pretrain", "./gone"]
    doors = {
        "infer": ("--eval_task generate_vllm --dataset d.jsonl --output_path o.jsonl", InferConfig, start.start_infer),
        "iterate": (
            "--method rs --prompt_data d.jsonl --run_dir r --reward_func f.py",
            IterateConfig,
            iterate.start_iterate,
        ),
        "kd": ("--teacher_model t --dataset d.jsonl --on_policy_share 1", KD, start.offline_door),
        "rl": (
            f"{' '.join(GROUP[2:])} --enable_vllm_is_correction",
            RLConfig,
            lambda parsed, announce: start.rl_door(parsed, reward_given=False, announce=announce),
        ),
    }
    for command, (words, settings, door) in doors.items():
        with pytest.raises(ConfigError, match=said):
            door(parse(settings, [*words.split(), *fp8, "--no_bf16"], command), announce=print)
        with pytest.raises(ConfigError, match=r"--pretrain \./gone"):
            door(parse(settings, [*words.split(), *fp8], command), announce=print)
