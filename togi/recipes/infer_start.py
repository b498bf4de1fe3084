"""The entry of ``togi infer``: check everything, then import and run. Imports no torch, so mistakes are reported at once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from togi.config.choices import PostProcessor
from togi.config.infer import InferConfig
from togi.config.infer_checks import check_infer
from togi.config.model_facts import check_length
from togi.config.parse import Parsed
from togi.data.items import parse_items
from togi.data.precheck import parse_probs
from togi.data.reward_text import asked_reward
from togi.errors import ConfigError
from togi.plan.machine import this_machine
from togi.plan.precision import usable_precision
from togi.recipes.modelscope import with_local_names
from togi.recipes.preflight import (
    check_engine,
    check_engine_heads,
    check_model,
    check_sets,
    check_writable,
    model_settings,
)
from togi.run.start import say_ignored

if TYPE_CHECKING:
    from togi.recipes.batch_inference import Written

logger = logging.getLogger(__name__)


def start_infer(parsed: Parsed[InferConfig], *, announce: Callable[[str], None] = logger.info) -> Written:
    """Check the settings, then generate or score. Raises UserError."""
    ready, notice = usable_precision(check(parsed), this_machine())
    if notice:
        announce(notice)
    say_ignored(ready.config, announce)
    if ready.config.zero_stage > 0:
        announce(f"--zero_stage {ready.config.zero_stage}: one process has nothing to shard, and holds the whole model")
    from togi.recipes.batch_inference import generate, score

    task = ready.config.eval_task
    assert task is not None
    return generate(ready.config, announce) if task.generates else score(ready.config, announce)


def check(parsed: Parsed[InferConfig]) -> Parsed[InferConfig]:
    """The settings with local names. Raises the first UserError. Loads no model and reads only the head of the data."""
    check_infer(parsed)
    parsed = with_local_names(parsed)
    config = parsed.config
    assert config.eval_task is not None
    # Engine, model and lengths.
    if config.eval_task.generates:
        check_engine(config.engine)
        asked_reward(config.csft_prompt, config.reward_template)
    check_model("pretrain", config.pretrain)
    if config.eval_task.generates:
        check_engine_heads("tp_size", config.tp_size, config.pretrain)
    length, asked = config.max_len, f"--max_len {config.max_len}"
    if config.eval_task.generates:
        length = config.context_length
        asked = f"--prompt_max_len {config.prompt_max_len} + --max_new_tokens {config.max_new_tokens}"
    check_length(asked, length, config.pretrain, model_settings(config.pretrain))
    # Data and output file.
    keys: dict[str, str | None] = {"input_key": config.input_key, "label_key": config.label_key}
    if not config.eval_task.generates:
        keys["output_key"] = config.output_key
    check_sets(
        "dataset", config.dataset, {flag: key for flag, key in keys.items() if key is not None}, config.dataset_split
    )
    if config.dataset_probs is not None:
        parse_probs(config.dataset_probs, len(parse_items(config.dataset)), "--dataset_probs")
    check_output(config)
    return parsed


def check_output(config: InferConfig) -> None:
    """Check that the output file can be written and is not an input. Raises ConfigError."""
    target = Path(config.output_path)
    check_writable("output_path", target.parent)
    if target.is_dir():
        raise ConfigError(f"--output_path {target} is a folder: give the path of a file in it.")
    if any(Path(item.path).absolute() == target.absolute() for item in parse_items(config.dataset)):
        raise ConfigError(f"--output_path {target} is also --dataset: choose another file.")
    if config.selection is PostProcessor.CSFT and config.apply_chat_template:
        raise ConfigError(
            "--post_processor csft tells the reward in the text of the prompt, which --apply_chat_template would render "
            "again: score the rendered prompts that togi infer wrote, without the template."
        )
