"""Contradictions between the settings of ``togi iterate``, found before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator

from togi.config.choices import IterateMethod
from togi.config.infer import RewardTextSettings
from togi.config.infer_checks import engine_problems, rendering_problems, reward_template_problems, sampling_problems
from togi.config.iterate import IterateConfig, PreferenceSettings
from togi.config.parse import Parsed, Source
from togi.errors import ConfigError


def check_iterate(parsed: Parsed[IterateConfig]) -> None:
    """Raise ConfigError with the first contradiction. Training flags are checked by the training command."""
    given = {name for name, source in parsed.sources.items() if source is not Source.DEFAULT}
    for message in _problems(parsed.config, given):
        raise ConfigError(message)


def _problems(c: IterateConfig, given: set[str]) -> Iterator[str]:
    yield from _required(c)
    yield from rendering_problems(c)
    yield from _reward(c)
    yield from _method(c, given)
    yield from sampling_problems(c, c.best_of_n, "best_of_n", temperature_given="temperature" in given)
    yield from engine_problems(c, c.rollout_engine, f"--rollout_engine {c.rollout_engine}")
    if c.ds_tensor_parallel_size > 1:
        yield "--ds_tensor_parallel_size needs several processes, but togi iterate trains in one: leave it out."
    if c.ring_attn_size > 1 or c.ring_head_stride > 1:
        yield "--ring_attn_size and --ring_head_stride need several processes, but togi iterate trains in one: leave them out."
    if c.eval_dataset is not None and c.eval_temperature == 0 and c.eval_n_samples_per_prompt > 1:
        yield (
            f"--eval_n_samples_per_prompt {c.eval_n_samples_per_prompt} with --eval_temperature 0 would give the same output "
            f"{c.eval_n_samples_per_prompt} times: set the first to 1."
        )


def _required(c: IterateConfig) -> Iterator[str]:
    if c.method is None:
        yield "--method is required: rs (rejection sampling), dpo (iterative DPO) or csft (conditional SFT)."
    if not c.pretrain:
        yield "--pretrain is required: the Hugging Face folder or hub name of the model to train."
    if not c.prompt_data:
        yield "--prompt_data is required: a JSON, JSONL, CSV, Parquet or Arrow file, a saved data set folder or a hub name."
    if not c.run_dir:
        yield "--run_dir is required: the folder of all rounds, in which the same command goes on after a stop."


def _reward(c: IterateConfig) -> Iterator[str]:
    if c.reward_file is None and c.reward_pretrain is None:
        yield "There is no reward: give --reward_func FILE.py, --reward_pretrain MODEL, or both."
    if c.reward_func is not None and c.remote_rm_url is not None:
        yield "--reward_func and --remote_rm_url name the same thing: leave one of them out."
    if c.reward_file is not None and not c.reward_file.endswith(".py"):
        yield f"--reward_func {c.reward_file} must be a Python file that defines reward_func(queries, prompts, labels)."
    if c.normalize_reward and c.reward_pretrain is None and c.method is not IterateMethod.CSFT:
        yield "--normalize_reward works on a reward model, or on the text of --method csft: leave it out."


def _method(c: IterateConfig, given: set[str]) -> Iterator[str]:
    """Flags that belong to another method."""
    for names, owner in ((RewardTextSettings, IterateMethod.CSFT), (PreferenceSettings, IterateMethod.DPO)):
        for name in names.model_fields:
            if name in given and c.method is not owner:
                yield f"--{name} belongs to --method {owner}, but --method is {c.method}: leave it out."
    yield from reward_template_problems(c.reward_template)
    if c.method is not IterateMethod.CSFT and c.best_of_n < 2:
        yield f"--best_of_n 1 leaves --method {c.method} nothing to choose from: set it to 2 or more."
