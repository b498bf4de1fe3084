"""The lines that ``togi check`` prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from togi.config.parse import Parsed, Source
from togi.config.shared import PromptText
from togi.data.chat import Tokenizer, visible
from togi.data.report import DataReport
from togi.model.sizes import Sizes
from togi.obs.redact import redact_value
from togi.pump.experience import ScoredGroup
from togi.sample import Outcome, Score

LONGEST = 2000
SHOWN_FAULTS = 3
SHOWN_GROUPS = 3
SHOWN = 200
PAIR = ("chosen", "rejected")


def settings(parsed: Parsed[Any]) -> Iterator[str]:
    """Every setting that was given, with its source. Settings derived from this machine are reported elsewhere."""
    values = parsed.config.model_dump(mode="json")
    given = {name: value for name, value in values.items() if parsed.sources[name] not in (Source.DEFAULT, Source.AUTO)}
    yield "settings (all others are at their defaults):"
    for name, value in given.items():
        words = " ".join(map(str, value)) if isinstance(value, list) else value
        shown = " ".join(str(redact_value(name, words)).split())
        yield f"  --{name} {shown if len(shown) <= SHOWN else shown[:SHOWN] + ' ...'} ({parsed.sources[name]})"


def model(flag: str, path: str, found: Sizes) -> str:
    """The size of a model."""
    adapter = f", {found.trained:,} of an adapter are trained" if found.adapter else ""
    return (
        f"model: --{flag} {path} has {found.weights:,} weights in {found.layers} layers of width {found.hidden}{adapter}; "
        f"its embedding has {found.embedding:,} rows"
    )


def tokenizer(found: Tokenizer, stops: Sequence[int]) -> str:
    """Type, size and special tokens of the tokenizer, and the tokens that end an answer."""
    names = {"BOS": found.bos_token, "EOS": found.eos_token, "padding": found.pad_token}
    special = ", ".join(f"{name} {token!r}" for name, token in names.items() if token is not None)
    ends = ", ".join(repr(visible(found, [stop])) for stop in stops)
    return f"tokenizer: {type(found).__name__} with {len(found):,} tokens ({special}); answers end at {ends}"


def template(config: PromptText, found: Tokenizer) -> str:
    """How a prompt becomes text."""
    if config.apply_chat_template:
        own = config.tokenizer_chat_template is None
        return f"template: {'the chat template of the tokenizer' if own else '--tokenizer_chat_template'}"
    rest = "; the tokenizer has a chat template, which is not used" if found.chat_template else ""
    if config.input_template is not None:
        return f"template: --input_template {config.input_template!r}{rest}"
    return f"template: none, rows are taken as they are{rest}"


def rows(name: str, report: DataReport, *, width: int = 1) -> Iterator[str]:
    """How many rows are used and dropped, their lengths, and the first examples as the model sees them.

    ``width``: examples of one row (2 for pairs).
    """
    title = report.title[0].lower() + report.title[1:]
    yield f"{name}: {title}, {report.kept} of {report.picked} are used; dropped: {report.drop_reasons()}"
    lengths = report.lengths
    yield (
        f"  tokens: shortest {lengths.min}, median {lengths.median}, 90% up to {lengths.p90}, 99% up to {lengths.p99}, "
        f"longest {lengths.max}"
    )
    for fault in report.faults.first[:SHOWN_FAULTS]:
        yield f"  faulty: {fault.reason}"
    for number, example in enumerate(report.examples):
        which = f", {PAIR[number % width]}" if width == len(PAIR) else ""
        yield f"  example {number // width + 1}{which}:"
        yield indented(example)


def indented(text: str) -> str:
    """A text indented under its heading; the middle of a long text is left out."""
    if len(text) > LONGEST:
        half = LONGEST // 2
        text = f"{text[:half]}\n... {len(text) - 2 * half:,} characters ...\n{text[-half:]}"
    return "\n".join(f"    {line}" for line in text.splitlines())


def reward(trial: Mapping[str, Sequence[Score]], answer: str) -> Iterator[str]:
    """The reward that each reward function gave when it was tried."""
    for name, scores in trial.items():
        yield f"reward: {name} says {score(scores[0])} of the answer {answer!r} to the first prompt"


def score(found: Score) -> str:
    """A reward in words, with its parts."""
    if found.outcome is not Outcome.SCORE:
        return str(found.outcome)
    parts = [f"{name} {value:g}" for name, value in found.components.items()]
    return f"{found.value:g}" + (f" ({', '.join(parts)})" if len(parts) > 1 else "")


def samples(groups: Sequence[ScoredGroup]) -> Iterator[str]:
    """The first answers of the first groups with their rewards."""
    for group in groups[:SHOWN_GROUPS]:
        rollout, found = group.rollouts[0], group.scores[0]
        text = rollout.response_text if len(rollout.response_text) <= SHOWN else f"{rollout.response_text[:SHOWN]}..."
        tokens = len(rollout.response_tokens)
        yield f"sample: {text!r} ({tokens} tokens, {rollout.finish_reason}), reward {score(found)}"
