"""Generate outputs for a file of prompts (``generate``), scores for a file of outputs (``score``), or talk (``Chat``).

The first two write rows as they finish and end with a file in order (``togi.data.row_log``), so the same command resumes after a
kill. Settings are checked by ``start``.
"""

import asyncio
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from togi.algo.best_of_n import mean_with_error, standardized
from togi.config.choices import EngineName, PostProcessor
from togi.config.infer import ChatConfig, InferConfig
from togi.data import chat
from togi.data.faults import Note, check_whole, named
from togi.data.messages import ASSISTANT, USER, Dialogue, Tool, read_tools
from togi.data.precheck import RecordSpec, asked_reward, with_reward
from togi.data.prompts import PromptSpec, fingerprint, load_prompts
from togi.data.row_log import RowLog, digest
from togi.data.rows import read_outputs
from togi.data.source import DEFAULT_DATASOURCE, load_mixture
from togi.data.turns import lost
from togi.device import default_device
from togi.errors import ConfigError, DataError, RewardError
from togi.model.generate import Answering, load_generator, stream
from togi.model.loading import known_tokens
from togi.obs.progress import Progress
from togi.obs.way_out import way_out
from togi.parallel.process import be_deterministic
from togi.rollout import create_engine
from togi.rollout.collect import SingleTurn, collect_groups
from togi.run.iterate_scores import Row
from togi.run.iterate_steps import select
from togi.run.loading import RewardModel, engine_settings, spec_of, tokenizer_of
from togi.sample import FinishReason, Prompt, Rollout, Sampling
from togi.weights.files import stamp

SCORED_AT_ONCE = 64
# The columns of a scored row. Others are those of the data.
WRITTEN = ("input", "output", "reward")
# Settings that the rows depend on, besides prompts and weights.
GENERATION = (
    *("eval_task", "seed", "best_of_n", "max_new_tokens", "prompt_max_len", "label_key", "bf16"),
    *("temperature", "top_p", "greedy_sampling", "repetition_penalty"),
    *("keep_special_tokens", "keep_tokens"),
)
SCORING = ("eval_task", "value_head_prefix", "bf16")
Announce = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Written:
    """The output of a finished command."""

    path: Path
    rows: int


def generate(config: InferConfig, announce: Announce) -> Written:
    """``--best_of_n`` outputs for every prompt of the slice, in the order of the prompts.

    Each output has its own seed, so the number of concurrent requests does not change the results.
    """
    if config.full_determinism:
        be_deterministic()
    with Progress() as progress:
        # Stage 1: prompts. No weights are loaded yet.
        with progress.phase("reading prompts", expected_seconds=8):
            tokenizer = tokenizer_of(config)
            known = known_tokens(config.pretrain, config.trust_remote_code)
            chat.check_vocabulary(tokenizer, config.pretrain, known, apply_chat_template=config.apply_chat_template)
            prompts, plain = ask(config, tokenizer, announce)
            largest = max((max(prompt.tokens, default=-1) for prompt in prompts), default=-1)
            chat.check_tokens(tokenizer, config.pretrain, known, lambda: largest)
        # Stage 2: generate what an earlier attempt did not; the log refuses rows of other settings or weights.
        # The rows hold labels and datasources too.
        copied = [(prompt.label, prompt.datasource) for prompt in prompts]
        identity = identity_of(config, GENERATION) | {
            "--dataset": digest(f"{fingerprint(prompts)} {copied!r}".encode())
        }
        with RowLog(Path(config.output_path), identity) as log:
            left = [(unit, prompt) for unit, prompt in enumerate(prompts) if unit not in log.done]
            if len(left) < len(prompts):
                announce(f"{len(prompts) - len(left)} of {len(prompts)} prompts were done by an earlier attempt")
            progress.start_steps(len(prompts), done=len(log.done))
            if left:
                asyncio.run(_generate(config, tokenizer, left, plain, log, progress))
            rows = log.in_order()
            log.finish(rows)
    # Stage 3: report truncated outputs.
    cut = sum(row["finish_reason"] == FinishReason.LENGTH for row in rows)
    if cut > 0:
        announce(
            f"{cut} of {len(rows)} outputs reached --max_new_tokens {config.max_new_tokens} (finish_reason length)"
        )
    return Written(log.path, len(rows))


def ask(config: InferConfig, tokenizer: chat.Tokenizer, announce: Announce) -> tuple[list[Prompt], list[str]]:
    """The prompts of this slice, with the csft reward in them, and their texts without it. Too long prompts are dropped and
    counted.
    """
    sets = {"prompt_data": config.dataset, "prompt_data_probs": config.dataset_probs, "split": config.dataset_split}
    spec = spec_of(PromptSpec, config, **sets)
    prompts = load_prompts(spec, tokenizer)
    if prompts.report.picked > prompts.report.kept:
        announce(f"prompts left out: {prompts.report.drop_reasons()}")
    chosen = list(prompts)
    # --iter picks one block of prompts.
    if config.iter is not None:
        start = config.iter * config.rollout_batch_size
        chosen = chosen[start : start + config.rollout_batch_size]
        if not chosen:
            raise ConfigError(
                f"--iter {config.iter} starts at prompt {start} of {len(prompts)}: give a smaller one, or more prompts."
            )
    plain = [chat.as_plain_text(prompt.text, tokenizer) for prompt in chosen]
    if not config.enable_csft:
        return chosen, plain
    # Conditional SFT: the reward text makes a prompt longer, so its length is checked again.
    reward = asked_reward(config.csft_prompt, config.reward_template)
    texts = [with_reward(config.reward_template, prompt.text, reward) for prompt in chosen]
    ids = chat.encode(texts, tokenizer, add_special_tokens=not config.apply_chat_template)
    told = [replace(prompt, text=text, tokens=tuple(t)) for prompt, text, t in zip(chosen, texts, ids, strict=True)]
    kept = [place for place, prompt in enumerate(told) if len(prompt.tokens) <= config.prompt_max_len]
    if len(kept) < len(told):
        announce(f"prompts left out: {len(told) - len(kept)} too long with the reward text")
    return [told[place] for place in kept], [plain[place] for place in kept]


async def _generate(
    config: InferConfig,
    tokenizer: chat.Tokenizer,
    left: Sequence[tuple[int, Prompt]],
    plain: Sequence[str],
    log: RowLog,
    progress: Progress,
) -> None:
    """Log the rows of each prompt as soon as all its outputs are finished."""
    sampling = Sampling(
        config.max_new_tokens,
        config.sampling_temperature,
        config.top_p,
        stop_token_ids=chat.stop_token_ids(tokenizer, config.pretrain, chat=config.apply_chat_template),
        repetition_penalty=config.repetition_penalty,
    )
    environment = SingleTurn(partial(chat.visible if config.keep_special_tokens else chat.decode, tokenizer), sampling)
    most = config.max_num_seqs if config.engine is EngineName.VLLM else config.micro_batch_size
    settings = replace(
        engine_settings(config, config, config.context_length),
        enable_prefix_caching=config.enable_prefix_caching,
        tensor_parallel_size=config.tp_size,
        gpu_memory_utilization=config.vllm_gpu_memory_utilization,
        max_num_seqs=most,
    )
    units = {prompt.id: unit for unit, prompt in left}
    with progress.phase("starting the engine", expected_seconds=15):
        engine = create_engine(config.engine, settings)
    try:
        groups = collect_groups(
            ((prompt.id, prompt) for _, prompt in left),
            environment,
            engine.generate,
            n_samples=config.best_of_n,
            # Twice the engine's capacity, so that it never waits for a request.
            max_in_flight=2 * most,
            seed=config.seed,
        )
        async for group in groups:
            unit = units[group[0].prompt.id]
            log.add(unit, [_row(config, plain[unit], tokenizer, n, rollout) for n, rollout in enumerate(group)])
            progress.step(len(log.done))
    finally:
        with way_out("shutting the engine down"):
            await engine.shutdown()


def _row(config: InferConfig, plain: str, tokenizer: chat.Tokenizer, number: int, rollout: Rollout) -> Row:
    """An output row. ``input``: the text that the model continued; ``prompt``: the same without the csft reward."""
    row: Row = {
        "input": chat.as_plain_text(rollout.prompt.text, tokenizer),
        "output": rollout.response_text,
        "id": rollout.prompt.id,
        "sample": number,
        "finish_reason": rollout.finish_reason.value,
    }
    if config.keep_tokens:
        row["output_tokens"] = list(rollout.response_tokens)
    if config.enable_csft:
        row["prompt"] = plain
    if config.label_key is not None:
        row["label"] = rollout.prompt.label
    if rollout.prompt.datasource != DEFAULT_DATASOURCE:
        row["datasource"] = rollout.prompt.datasource
    return row


def score(config: InferConfig, announce: Announce) -> Written:
    """Score every row, then apply the post-processor. Other columns of a row are kept, but never in place of WRITTEN."""
    if config.full_determinism:
        be_deterministic()
    with Progress() as progress:
        # Stage 1: rows. No weights are loaded yet.
        with progress.phase("reading rows", expected_seconds=8):
            tokenizer = tokenizer_of(config)
            mixture = load_mixture(
                config.dataset,
                config.dataset_probs,
                split=config.dataset_split,
                seed=config.seed,
                max_samples=config.max_samples,
            )
            keys = {"input_key", "output_key", "apply_chat_template", "input_template", "max_len"}
            spec = RecordSpec(config.dataset, **config.model_dump(include=keys))
            rows, ids = read_outputs(mixture, spec, tokenizer)
            more, left_out = _more_columns(config, rows)
            if left_out:
                counts = ", ".join(f"{name!r} in {count} rows" for name, count in sorted(left_out.items()))
                announce(f"columns left out, as infer writes its own of this name or JSON has no such value: {counts}")
            known = known_tokens(config.pretrain, config.trust_remote_code)
            largest = max((max(tokens, default=-1) for tokens in ids), default=-1)
            chat.check_tokens(tokenizer, config.pretrain, known, lambda: largest)
        # Stage 2: score what an earlier attempt did not, then select.
        tokens = digest(repr(ids).encode())
        identity = identity_of(config, SCORING) | {"--dataset": tokens}
        with RowLog(Path(config.output_path), identity) as log:
            texts = ((row[config.input_key], row[config.output_key]) for row in rows)
            scored = [
                {"input": prompt, "output": output, **rest, "reward": reward}
                for (prompt, output), rest, reward in zip(
                    texts, more, _rewards(config, ids, log, progress), strict=True
                )
            ]
            estimate = mean_with_error([row["reward"] for row in scored])
            announce(f"mean reward {estimate.mean:.4f} +- {estimate.standard_error:.4f} over {estimate.count} rows")
            if config.selection is not None:
                selection = select(scored, config.selection, reward_template=config.reward_template)
                announce(f"{config.selection}: {selection.describe()}")
                scored = list(selection.rows)
            log.finish(scored)
    return Written(log.path, len(scored))


def _rewards(config: InferConfig, ids: Sequence[Sequence[int]], log: RowLog, progress: Progress) -> list[float]:
    """The rewards in row order, standardised with ``--normalize_reward``."""
    # A chunk is the unit of a resume.
    chunks = [ids[start : start + SCORED_AT_ONCE] for start in range(0, len(ids), SCORED_AT_ONCE)]
    with progress.phase("loading the reward model", expected_seconds=5):
        model = RewardModel(config.pretrain, config, default_device(max(config.local_rank, 0)))
    progress.start_steps(len(chunks), done=len(log.done))
    for number, chunk in enumerate(chunks):
        if number not in log.done:
            found = model.scores(chunk, config.max_tokens_per_gpu, config.micro_batch_size)
            log.add(number, [{"score": score} for score in found])
            progress.step(len(log.done))
    raw = [row["score"] for row in log.in_order()]
    for number, value in enumerate(raw):
        if not math.isfinite(value):
            raise RewardError(
                f"--pretrain {config.pretrain} gave {value} for row {number}: check its weights and its number format."
            )
    # csft z-scores over all rows; otherwise the statistics in the model's config are used.
    if config.normalize_reward and config.selection is PostProcessor.CSFT:
        return standardized(raw)
    return [model.standardize(value) for value in raw]


def _more_columns(config: InferConfig, rows: Sequence[Mapping[str, object]]) -> tuple[list[Row], Counter[str]]:
    """The columns of each row beside prompt and output that can be written, and the number of others by name.

    Raises DataError for a prompt or an output that cannot be written.
    """
    keys, kept, left_out = (config.input_key, config.output_key), list[Row](), Counter[str]()
    for number, row in enumerate(rows):
        if not all(_is_json(row[key]) for key in keys):
            raise DataError(
                f"Row {number} of {config.dataset} has a message with values that JSON cannot hold: remove them."
            )
        named_otherwise = {name: value for name, value in row.items() if name not in (*keys, *WRITTEN)}
        kept.append({name: value for name, value in named_otherwise.items() if _is_json(value)})
        left_out.update(row.keys() - kept[-1].keys() - set(keys))
    return kept, left_out


def _is_json(value: object) -> bool:
    """Not of a time, bytes, a decimal, as Parquet has them, or NaN."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def identity_of(config: InferConfig, names: Sequence[str]) -> dict[str, str]:
    """What must be equal for a resume: settings, and the weights (``weights.files.stamp``)."""
    settings = {f"--{name}": str(config.model_dump()[name]) for name in names}
    return settings | {"--pretrain": config.pretrain, "weights of --pretrain": stamp(config.pretrain)}


# Second part: a conversation. The whole history is formatted anew for each turn, and answers stream as text.


class Chat:
    """The model and the turns so far: with a chat template messages, in plain text one text that grows by a line break and
    ``--input_template`` per turn, after ``--ta_prompt``.

    Raises DataError or ModelError for a model that cannot chat, and DataError for a file that cannot be read.
    """

    def __init__(self, config: ChatConfig) -> None:
        path, trust = config.pretrain, config.trust_remote_code
        self._config, self._tokenizer = config, tokenizer_of(config)
        if config.apply_chat_template and not self._tokenizer.chat_template:
            raise DataError(
                f"The tokenizer of {path} has no chat template: use an instruct model, give --tokenizer_chat_template, or "
                "talk in plain text with --no_apply_chat_template."
            )
        self._tools: tuple[Tool, ...] = ()
        if config.apply_chat_template and config.tools is not None:
            text = _read(config.tools, "tools", "a JSON file with a list of tools")
            with named(f"--tools {Path(config.tools)}"):
                self._tools = read_tools(text, set())
        self._start: list[str] = []
        if not config.apply_chat_template and config.ta_prompt is not None:
            self._start = [_read(config.ta_prompt, "ta_prompt", "a text file")]
        self._turns: list[tuple[str, str]] = []
        self._known = known_tokens(path, trust)
        chat.check_vocabulary(self._tokenizer, path, self._known, apply_chat_template=config.apply_chat_template)
        stops = chat.stop_token_ids(self._tokenizer, path, chat=config.apply_chat_template)
        temperature = 0.0 if config.greedy_sampling else config.temperature
        self._how = Answering(config.max_len, temperature, config.top_p, stops, config.repetition_penalty)
        # The checks above read small files only; the weights come last.
        self._model = load_generator(
            path,
            bf16=config.bf16,
            trust_remote_code=trust,
            in_4bit=config.load_in_4bit,
        )

    def clear(self) -> None:
        """Clear the history."""
        self._turns.clear()

    def answer(self, text: str) -> Iterator[str]:
        """The model's answer to ``text``, as a stream. Both are added to the history when the answer is complete."""
        config = self._config
        rendered = self._conversation(text) if config.apply_chat_template else self._plain_text(text)
        if config.enable_csft:
            reward = asked_reward(config.csft_prompt, config.reward_template)
            rendered = with_reward(config.reward_template, rendered, reward)
        tokens = chat.encode([rendered], self._tokenizer, add_special_tokens=not config.apply_chat_template)[0]
        chat.check_tokens(self._tokenizer, config.pretrain, self._known, lambda: max(tokens))
        pieces = []
        for piece in stream(self._model, self._tokenizer, tokens, self._how):
            pieces.append(piece)
            yield piece
        # Not reached if the caller stops early: an interrupted answer does not enter the history.
        self._turns.append((text, "".join(pieces)))

    def _conversation(self, text: str) -> str:
        said = [part for question, answer in self._turns for part in ((USER, question), (ASSISTANT, answer))]
        messages = tuple({"role": role, "content": content} for role, content in (*said, (USER, text)))
        dialogue = Dialogue(messages, self._tools)
        with named("The conversation"):
            rendered = chat.render_messages(dialogue, self._tokenizer, add_generation_prompt=True)
            check_whole(rendered, "has")
        if Note.TOOLS_UNSEEN in lost(dialogue, rendered):
            raise DataError(
                "--tools: the chat template does not show the tools to the model: use a template that renders tools "
                "(--tokenizer_chat_template), or leave --tools out."
            )
        return rendered

    def _plain_text(self, text: str) -> str:
        template = "{}" if self._config.input_template is None else self._config.input_template
        turns = (template.replace("{}", question) + answer for question, answer in (*self._turns, (text, "")))
        return "\n".join([*self._start, *turns])


def _read(path: str, flag: str, wanted: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--{flag} {Path(path)} cannot be read ({error}): give {wanted}.") from None
