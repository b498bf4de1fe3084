"""The front door of ``togi iterate``: check everything, then run. Imports no torch; steps are processes of their own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from togi.config.choices import IterateMethod
from togi.config.iterate import IterateConfig
from togi.config.iterate_checks import check_iterate
from togi.config.model_facts import check_length
from togi.config.parse import Parsed, parse
from togi.data.items import parse_items
from togi.data.precheck import parse_probs
from togi.data.reward_text import asked_reward
from togi.methods import METHODS
from togi.methods.checks import check_method
from togi.plan.machine import this_machine
from togi.plan.precision import usable_precision
from togi.recipes.iterate import Result, run
from togi.recipes.iterate_steps import Launch, Steps, subprocess_step
from togi.recipes.preflight import (
    check_engine,
    check_model,
    check_reward_file,
    check_sets,
    check_writable,
    model_settings,
)

logger = logging.getLogger(__name__)


def start_iterate(
    parsed: Parsed[IterateConfig],
    *,
    announce: Callable[[str], None] = logger.info,
    launch: Launch = subprocess_step,
) -> Result:
    """Check, then run all rounds. ``launch`` runs one command of a step. Raises UserError for the user's mistakes."""
    check(parsed)
    ready, notice = usable_precision(parsed, this_machine())
    if notice:
        announce(notice)
    return run(ready.config, announce, launch)


def check(parsed: Parsed[IterateConfig]) -> None:
    """Raise the first UserError. No model is loaded, and of the data only its head is read."""
    check_iterate(parsed)
    config = parsed.config
    check_engine(config.rollout_engine)
    check_model("pretrain", config.pretrain)
    if config.reward_pretrain is not None:
        check_model("reward_pretrain", config.reward_pretrain)
    check_lengths(config)
    if config.method is IterateMethod.CSFT:
        asked_reward(config.csft_prompt, config.reward_template)
    keys = {"input_key": config.input_key} | ({"label_key": config.label_key} if config.label_key is not None else {})
    check_sets("prompt_data", config.prompt_data, keys, config.prompt_split)
    if config.prompt_data_probs is not None:
        parse_probs(config.prompt_data_probs, len(parse_items(config.prompt_data)), "--prompt_data_probs")
    if config.eval_dataset is not None:
        check_sets("eval_dataset", config.eval_dataset, keys, config.eval_split)
    if config.reward_file is not None:
        check_reward_file(Path(config.reward_file))
    check_writable("run_dir", Path(config.run_dir))
    check_training(config)


def check_lengths(config: IterateConfig) -> None:
    """What is generated and what is trained on fits the model's positions."""
    for length, asked in (
        (config.context_length, f"--prompt_max_len {config.prompt_max_len} + --max_new_tokens {config.max_new_tokens}"),
        (config.max_len, f"--max_len {config.max_len}"),
    ):
        check_length(asked, length, config.pretrain, model_settings(config.pretrain))


def check_training(config: IterateConfig) -> None:
    """The command that every round trains with is sound."""
    command, argv = Steps(config, Path(config.run_dir), subprocess_step).training_command(1, config.pretrain)
    check_method(parse(METHODS[command], argv, command))
