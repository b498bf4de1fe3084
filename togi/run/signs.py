"""Whether a run would learn, judged by settings, prompts, sampled rewards and answers. One sentence per sign.

A sign stops learning only if no update could come of what was seen; anything that is merely unlikely to work is a warning.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

import numpy as np

from togi.config.choices import BUILTIN, Verifier, WorkersKind
from togi.config.rl import RLConfig
from togi.data.chat import Tokenizer, encode, render_messages, visible
from togi.data.messages import ASSISTANT, USER, Dialogue
from togi.errors import DataError
from togi.learn.schedule import highest, standing_still
from togi.pump.experience import Place, ScoredGroup, trainable
from togi.reward.scores import OVERLONG, STOP_PROPERLY
from togi.run.plan import StepPlan
from togi.run.rewards import reward_names
from togi.run.rl_setup import Material
from togi.sample import FinishReason, Outcome, Rollout, Score

# Fewer answers prove nothing.
ENOUGH = 8
PARALLEL = 0.99


class Verdict(StrEnum):
    FINE = "fine"
    NOTE = "note"
    WARNING = "warning"
    STOPS = "stops learning"


@dataclass(frozen=True, slots=True)
class Sign:
    """One observation, with its number and the remedy, in one sentence."""

    verdict: Verdict
    sentence: str


fine = partial(Sign, Verdict.FINE)
note = partial(Sign, Verdict.NOTE)
warning = partial(Sign, Verdict.WARNING)
stops = partial(Sign, Verdict.STOPS)


def grave(sentence: str, *, certain: bool) -> Sign:
    """A sign that stops learning if it is certain, else a warning."""
    return stops(sentence) if certain else warning(sentence)


def setting_signs(config: RLConfig, plan: StepPlan) -> Iterator[Sign]:
    """Settings under which the actor never changes, and those that do nothing in this run."""
    if config.actor_learning_rate == 0:
        yield stops("--actor_learning_rate 0 changes no weight: give a rate above 0, such as 1e-6.")
    elif plan.actor_updates == 0:
        yield stops(
            f"--freezing_actor_steps {config.freezing_actor_steps} freezes the actor on all {plan.rollouts} rollouts: lower it, "
            "or raise --num_episodes.",
        )
    elif still := standing_still(config, config.actor_learning_rate, plan.actor_updates):
        yield stops(still)
    else:
        rate = highest(config, config.actor_learning_rate, plan.actor_updates)
        yield fine(f"{plan.actor_updates} updates of the actor at a learning rate of up to {rate:g}.")
    if (staleness := config.max_staleness) > 0 and 1 < plan.rollouts <= staleness + 1:
        yield warning(
            f"--max_staleness {staleness} lets the prompts of all {plan.rollouts} rollouts start with the first weights: "
            "lower it, or raise --num_episodes."
        )
    for name in config.changed("max_restarts", "engine_timeout") if config.workers is WorkersKind.LOCAL else ():
        yield warning(
            f"--{name} does nothing, as engine and models are in this process and end with it: --workers ray gives each its own."
        )


def prompt_signs(config: RLConfig, material: Material, tokenizer: Tokenizer) -> Iterator[Sign]:
    """Labels that carry no information, and prompts without the format of a chat model."""
    prompts = material.prompts
    if config.label_key is not None:
        yield from _label_signs(config.label_key, [prompt.label for prompt in prompts])
    # Tokens that are not text: special tokens and all tokens added to the vocabulary, which templates use.
    special = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids} - {tokenizer.bos_token_id}
    # A prompt that already has special tokens was formatted by the user.
    rendered = any(not special.isdisjoint(prompt.tokens) for prompt in prompts[:ENOUGH])
    if tokenizer.chat_template and not config.apply_chat_template and not rendered:
        yield note(
            "The tokenizer has a chat template and prompts are plain text: if this is an instruct model, add "
            "--apply_chat_template."
        )


def _label_signs(key: str, labels: Sequence[object]) -> Iterator[Sign]:
    empty = sum(label is None or label in ("", [], {}) for label in labels)
    if empty == len(labels):
        yield warning(
            f"The field {key!r} is empty in all {empty} rows: name the field of the reference answers with --label_key."
        )
    elif empty > 0:
        yield warning(f"The field {key!r} is empty in {empty} of {len(labels)} rows: fill it, or leave those rows out.")
    elif len(labels) > 1 and all(label == labels[0] for label in labels):
        yield warning(
            f"The field {key!r} is {labels[0]!r} in all {len(labels)} rows: if answers differ, name their field with "
            "--label_key."
        )


def reward_signs(config: RLConfig, groups: Sequence[ScoredGroup]) -> Iterator[Sign]:
    """Signs in the rewards of sampled groups: failures, no variance, parts never reached, length alone."""
    scores = [score for group in groups for score in group.scores]
    yield from _failure_signs(config, scores)
    places = trainable(groups, config.on_reward_error)
    if not any(score.outcome is Outcome.SCORE for score in scores):
        return
    if not places and config.dynamic_filtering:
        low, high = config.dynamic_filtering_reward_range
        yield grave(
            f"--dynamic_filtering leaves out all {len(groups)} groups, as none has a mean reward between {low:g} and {high:g}: "
            "widen --dynamic_filtering_reward_range, or give prompts that are solved sometimes.",
            certain=len(scores) >= ENOUGH,
        )
    elif places:
        yield from _variance_signs(config, groups, places)
    yield from _part_signs(config, [score for score in scores if score.outcome is Outcome.SCORE])
    yield from _length_signs(config, groups, places)


def _failure_signs(config: RLConfig, scores: Sequence[Score]) -> Iterator[Sign]:
    """Rewards that failed or abstained."""
    errors = [score for score in scores if score.outcome is Outcome.ERROR]
    silent, number = sum(score.outcome is Outcome.ABSTAIN for score in scores), len(scores)
    allowed = config.allowed_reward_errors
    if errors:
        yield grave(
            f"The reward of {len(errors)} of {number} answers failed, and the run stops above a share of {allowed:g} of a "
            f"rollout; the first: {errors[0].message}",
            certain=len(errors) == number or allowed == 0,
        )
    if silent > 0:
        yield grave(
            f"The reward abstained on {silent} of {number} answers, which are not trained on: return a number for each "
            "answer that is to count.",
            certain=silent == number,
        )


def _variance_signs(config: RLConfig, groups: Sequence[ScoredGroup], places: Sequence[Place]) -> Iterator[Sign]:
    """Whether rewards differ where the advantage estimator compares them: within groups, or over all answers."""
    values = [groups[group].scores[index].value for group, index in places]
    by_group: dict[int, list[float]] = {}
    for (group, _), value in zip(places, values, strict=True):
        by_group.setdefault(group, []).append(value)
    # A group of equal rewards has advantage 0 for all of its answers.
    flat = [rewards[0] for rewards in by_group.values() if min(rewards) == max(rewards)]
    low, high, certain = min(values), max(values), len(values) >= ENOUGH
    if low == high:
        yield grave(
            f"The reward is {low:g} for all {len(values)} answers, so that no answer is better than another: try the reward "
            "function on a right and on a wrong answer, and take prompts that the model solves sometimes.",
            certain=certain,
        )
        if config.label_key is None and not config.acts:
            yield note("No --label_key is set, so that the reward is given empty labels: name their field.")
    elif not config.advantage_estimator.uses_groups:
        yield fine(f"Rewards differ: {low:g} to {high:g} over {len(values)} answers.")
    elif len(flat) == len(by_group):
        yield grave(
            f"In all {len(flat)} groups every answer has the same reward, and --advantage_estimator {config.advantage_estimator} "
            "learns from differences within a group: let the reward depend on the answer, or raise --n_samples_per_prompt.",
            certain=certain,
        )
    else:
        text = f"{len(by_group) - len(flat)} of {len(by_group)} groups have answers that differ in reward ({low:g} to {high:g})"
        ends = f"in {flat.count(low)} of the others all are at {low:g}, in {flat.count(high)} all at {high:g}"
        advice = "take prompts that are solved sometimes, or raise --n_samples_per_prompt"
        yield fine(f"{text}.") if 2 * len(flat) <= len(by_group) else warning(f"Only {text}; {ends}: {advice}.")


def _part_signs(config: RLConfig, scores: Sequence[Score]) -> Iterator[Sign]:
    """Named parts of the reward that are always 0. A part that is only logged may have no weight, so it is a note."""
    whole = reward_names(config, function_given=False)
    # Length penalties are 0 for a good answer, and a single reward is judged as a whole above.
    skipped = {OVERLONG, STOP_PROPERLY, *(whole if len(whole) == 1 else ())}
    names = dict.fromkeys(name for score in scores for name in score.components if name not in skipped)
    for name in names:
        values = [score.components[name] for score in scores if name in score.components]
        if len(values) >= ENOUGH and not any(values):
            yield Sign(
                Verdict.WARNING if name in whole else Verdict.NOTE,
                f"The part {name!r} of the reward is 0 for all {len(values)} answers: nothing teaches to reach it, so show the "
                "form in the prompt or by supervised fine-tuning first, or reward steps towards it.",
            )


def _length_signs(config: RLConfig, groups: Sequence[ScoredGroup], places: Sequence[Place]) -> Iterator[Sign]:
    """A reward that is a function of the length only."""
    # These settings ask for a reward that depends on length.
    if f"{BUILTIN}{Verifier.LENGTH}" in config.reward_files or config.uses_length_penalties:
        return
    lengths = np.array(
        [len(groups[group].rollouts[index].response_tokens) for group, index in places], dtype=np.float64
    )
    values = np.array([groups[group].scores[index].value for group, index in places])
    if len(set(lengths)) < ENOUGH or len(set(values)) < ENOUGH:
        return
    along = float(np.corrcoef(lengths, values)[0, 1])
    if abs(along) > PARALLEL:
        yield warning(
            f"The reward follows the length of the answers (correlation {along:.3f} over {len(places)} answers), so that "
            f"{'long' if along > 0 else 'short'} answers alone are learnt: let it depend on what they say."
        )


# Shares of the answers above which a sign is a warning.
CUT, EMPTY, DRIFT = 0.25, 0.5, 0.5
QUESTION = "How are you?"
SHOWN = 40


def answer_signs(
    config: RLConfig, groups: Sequence[ScoredGroup], tokenizer: Tokenizer, stops: Sequence[int]
) -> Iterator[Sign]:
    """Answers that are truncated, never end, or are empty."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    number, limit = len(rollouts), config.generate_max_len
    cut = sum(rollout.finish_reason is FinishReason.LENGTH for rollout in rollouts)
    lengths = sorted(len(rollout.response_tokens) for rollout in rollouts)
    median = lengths[number // 2]
    if cut == number:
        ends = ", ".join(repr(visible(tokenizer, [stop])) for stop in stops)
        yield warning(
            f"None of {number} answers ends in a stop token ({ends}), all are cut at --generate_max_len {limit}: raise it, or "
            "take a model and a template whose answers end."
        )
    else:
        text = f"{cut} of {number} answers are cut at --generate_max_len {limit} (median {median} tokens)"
        yield warning(f"{text}: raise it.") if cut > CUT * number else fine(f"{text}.")
    empty = sum(not rollout.response_text.strip() for rollout in rollouts)
    if empty > EMPTY * number:
        yield grave(
            f"{empty} of {number} answers have no text, only special tokens or white space: check that prompts end where the "
            "model begins to answer (--apply_chat_template, --input_template).",
            certain=empty == number >= ENOUGH,
        )


def template_signs(
    config: RLConfig, groups: Sequence[ScoredGroup], tokenizer: Tokenizer, stops: Sequence[int]
) -> Iterator[Sign]:
    """Whether text and tokens of prompt and answer agree under the tokenizer and the chat template."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    yield from _token_signs(config, rollouts, tokenizer, stops)
    if config.apply_chat_template:
        found = [how for rollout in rollouts if (how := drift(rollout.response_text, tokenizer))]
        if found:
            yield warning(
                f"In {len(found)} of {len(rollouts)} conversations with the answer the chat template does not continue its own "
                f"prompt ({found[0]}): later turns and supervised rows are not what is trained here; give a "
                "--tokenizer_chat_template that does."
            )


def _token_signs(
    config: RLConfig, rollouts: Sequence[Rollout], tokenizer: Tokenizer, stops: Sequence[int]
) -> Iterator[Sign]:
    """Whether the text of prompt and answer encodes to the same tokens again."""
    merged, other, number = 0, 0, len(rollouts)
    for rollout in rollouts:
        prompt, answer = rollout.prompt.tokens, rollout.response_tokens
        if answer and answer[-1] in stops:
            answer = answer[:-1]
        text = rollout.prompt.text + _continuation(prompt, answer, tokenizer)
        try:
            (again,) = encode([text], tokenizer, add_special_tokens=not config.apply_chat_template)
        except DataError:  # two BOS tokens in a row, by an answer that begins with one
            other += 1
            continue
        # Counted apart: a merge at the border of prompt and answer, and any other difference.
        merged += tuple(again[: len(prompt)]) != prompt
        other += tuple(again) != prompt + answer
    if merged > DRIFT * number:
        yield warning(
            f"In {merged} of {number} answers the tokenizer would join the end of the prompt with the start of the answer, so "
            "that the model never saw such a beginning: end the prompt without a space (--input_template)."
        )
    elif other > DRIFT * number:
        yield warning(
            f"The text of {other} of {number} answers becomes other tokens than were sampled, so that the reward may read what "
            "the model did not mean: sample at a lower --temperature, or check that tokenizer and model belong together."
        )
    else:
        yield fine(f"The text of {number - other} of {number} answers becomes the sampled tokens again.")


def drift(answer: str, tokenizer: Tokenizer) -> str:
    """How the chat template changes its own prompt once the answer is in the conversation, in words; "" if it does not.

    Also "" if the template refuses the answer or does not show it verbatim, since nothing can be said then.
    """
    question = Dialogue(({"role": USER, "content": QUESTION},))
    answered = question.extended(Dialogue(({"role": ASSISTANT, "content": answer},)))
    prompt, text = render_messages(question, tokenizer, add_generation_prompt=True), answer.strip()
    try:
        whole = render_messages(answered, tokenizer)
    except DataError:
        return ""
    if not text or text not in whole:
        return ""
    if not whole.startswith(prompt):
        return "it begins otherwise"
    before = whole[len(prompt) : whole.rindex(text)].strip()
    return f"it puts {before[-SHOWN:]!r} before the answer" if before else ""


def _continuation(prompt: Sequence[int], answer: Sequence[int], tokenizer: Tokenizer) -> str:
    """The text of the answer in its place after the prompt: some tokenizers drop a space at the start of a text."""
    before, whole = visible(tokenizer, prompt), visible(tokenizer, (*prompt, *answer))
    return whole[len(before) :] if whole.startswith(before) else visible(tokenizer, answer)
