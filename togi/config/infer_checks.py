"""Contradictions between the settings of ``togi infer`` and ``togi chat``, found before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator

from togi.config.chat import ChatConfig
from togi.config.checks import chat_template_problems, template_problems
from togi.config.choices import EngineName, EvalTask, PostProcessor
from togi.config.infer import GenerationSettings, InferConfig, ScoringSettings, SliceSettings
from togi.config.parse import Parsed, Source
from togi.config.shared import PromptText
from togi.errors import ConfigError

GENERATING = (*GenerationSettings.model_fields, *SliceSettings.model_fields)
SCORING = tuple(ScoringSettings.model_fields)


def check_infer(parsed: Parsed[InferConfig]) -> None:
    """Raise ConfigError with the first contradiction. Each message names the flags and the remedy."""
    for message in _problems(parsed):
        raise ConfigError(message)


def _problems(parsed: Parsed[InferConfig]) -> Iterator[str]:
    config = parsed.config
    given = {name for name, source in parsed.sources.items() if source is not Source.DEFAULT}
    # Required flags, flags of the other task, then the flags of this one.
    yield from _required(config)
    yield from _foreign(config, given)
    yield from rendering_problems(config)
    yield from reward_template_problems(config.reward_template)
    if config.eval_task is EvalTask.RM:
        yield from _scoring(config, given)
    else:
        yield from _generation(config, given)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        yield (
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but --eval_task {config.eval_task} runs in one process: start it "
            "with plain python, and give each device a part of the rows (--iter)."
        )


def check_chat(parsed: Parsed[ChatConfig]) -> None:
    """Like ``check_infer``, for ``togi chat``."""
    given = {name for name, source in parsed.sources.items() if source is not Source.DEFAULT}
    for message in _chat_problems(parsed.config, given):
        raise ConfigError(message)


def _chat_problems(c: ChatConfig, given: set[str]) -> Iterator[str]:
    if not c.pretrain:
        yield "--pretrain is required: the folder or hub name of the model to talk to."
    # Flags for plain text, then flags for chats.
    for name in ("input_template", "ta_prompt"):
        if c.apply_chat_template and name in given:
            yield f"--{name} is for plain text: add --no_apply_chat_template, or leave --{name} out."
    if not c.apply_chat_template:
        if c.tools is not None:
            yield "--tools needs the chat template, which shows them: leave --tools or --no_apply_chat_template out."
        if c.tokenizer_chat_template is not None:
            yield "--tokenizer_chat_template and --no_apply_chat_template exclude each other: leave one of them out."
        if c.input_template is not None:
            yield from template_problems(c.input_template, applied=False)
    if c.greedy_sampling and "temperature" in given and c.temperature > 0:
        yield "--greedy_sampling takes the most likely token but --temperature draws one: leave one of them out."
    yield from reward_template_problems(c.reward_template)
    if not c.enable_csft:
        for name in ("csft_prompt", "reward_template"):
            if name in given:
                yield f"--{name} is only used with --enable_csft: add it, or leave the first out."


def rendering_problems(c: PromptText) -> Iterator[str]:
    """Faults of the flags that format prompts."""
    if c.input_template is not None:
        yield from template_problems(c.input_template, applied=c.apply_chat_template)
    yield from chat_template_problems(c.tokenizer_chat_template, applied=c.apply_chat_template)


def reward_template_problems(template: str) -> Iterator[str]:
    """Faults of a ``--reward_template``."""
    if template.count("{input}") != 1 or template.count("{reward}") != 1:
        yield f"--reward_template must contain {{input}} and {{reward}} exactly once each, but is {template!r}."


def sampling_problems(c: GenerationSettings, samples: int, flag: str, *, temperature_given: bool) -> Iterator[str]:
    """Faults of the sampling flags. ``samples``: outputs per prompt, set by ``flag``."""
    if c.greedy_sampling and temperature_given and c.temperature > 0:
        yield "--greedy_sampling takes the most likely token but --temperature draws one: leave one of them out."
    if samples > 1 and (c.greedy_sampling or c.temperature == 0):
        which = "--greedy_sampling" if c.greedy_sampling else "--temperature 0"
        yield f"--{flag} {samples} with {which} would give the same output {samples} times: leave one of them out."


def engine_problems(c: GenerationSettings, engine: EngineName, flag: str) -> Iterator[str]:
    """vLLM's own flags with another engine, which ``flag`` chose."""
    if engine is EngineName.TRANSFORMERS:
        for name in c.changed("enforce_eager", "tp_size"):
            yield f"--{name} is vLLM's but {flag} generates with Transformers: change one of them."


def _required(c: InferConfig) -> Iterator[str]:
    if c.eval_task is None:
        yield "--eval_task is required: generate_vllm, generate (Transformers engine), or rm (score with a reward model)."
    if not c.pretrain:
        yield "--pretrain is required: the Hugging Face folder or hub name of the model to run."
    if not c.dataset:
        yield "--dataset is required: a JSON, JSONL, CSV, Parquet or Arrow file, a saved data set folder or a hub name."
    if not c.output_path:
        yield "--output_path is required: the JSONL file to write."
    elif not c.output_path.endswith((".jsonl", ".json")):
        yield f"--output_path {c.output_path} must end in .jsonl: the file has one object a line."


def _foreign(c: InferConfig, given: set[str]) -> Iterator[str]:
    """Flags that the task would ignore."""
    names, other = (GENERATING, "rm scores") if c.eval_task is EvalTask.RM else (SCORING, f"{c.eval_task} generates")
    for name in names:
        if name in given:
            yield f"--{name} has no meaning here, --eval_task {other}: leave it out."


def _generation(c: InferConfig, given: set[str]) -> Iterator[str]:
    yield from sampling_problems(c, c.best_of_n, "best_of_n", temperature_given="temperature" in given)
    yield from engine_problems(c, c.engine, f"--eval_task {c.eval_task}")
    if c.iter is None and "rollout_batch_size" in given:
        yield "--rollout_batch_size is the size of the slices of --iter, which is not set: add it or leave the first out."
    if not c.enable_csft:
        for name in ("csft_prompt", "reward_template"):
            if name in given:
                yield f"--{name} is only used with --enable_csft: add it, or leave the first out."


def _scoring(c: InferConfig, given: set[str]) -> Iterator[str]:
    if "csft_prompt" in given:
        yield "--csft_prompt asks for a reward in generation, --eval_task rm measures it: leave it out."
    if "reward_template" in given and c.selection is not PostProcessor.CSFT:
        yield "--reward_template is only used with --post_processor csft: add it, or leave the first out."
    if c.max_tokens_per_gpu < c.max_len:
        yield f"--max_tokens_per_gpu {c.max_tokens_per_gpu} is less than --max_len {c.max_len}: raise the first."
