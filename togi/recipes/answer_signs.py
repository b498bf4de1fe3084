"""Whether a run would learn: what sampled answers say about lengths, stop tokens and templates. One sentence a sign."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from togi.config.rl import RLConfig
from togi.data.chat import Tokenizer, encode, render_messages, visible
from togi.data.messages import ASSISTANT, USER, Dialogue
from togi.errors import DataError
from togi.pump.experience import ScoredGroup
from togi.recipes.learn_signs import ENOUGH, Sign, Verdict
from togi.sample import FinishReason, Rollout

# Shares of the answers above which something is worth a warning.
CUT, EMPTY, DRIFT = 0.25, 0.5, 0.5
QUESTION = "How are you?"
SHOWN = 40


def answer_signs(
    config: RLConfig, groups: Sequence[ScoredGroup], tokenizer: Tokenizer, stops: Sequence[int]
) -> Iterator[Sign]:
    """Answers that are cut, never end, or are empty."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    number, limit = len(rollouts), config.generate_max_len
    cut = sum(rollout.finish_reason is FinishReason.LENGTH for rollout in rollouts)
    lengths = sorted(len(rollout.response_tokens) for rollout in rollouts)
    median = lengths[number // 2]
    if cut == number:
        ends = ", ".join(repr(visible(tokenizer, [stop])) for stop in stops)
        yield Sign(
            Verdict.WARNING,
            f"None of {number} answers ends in a stop token ({ends}), all are cut at --generate_max_len {limit}: raise it, or "
            "take a model and a template whose answers end.",
        )
    elif cut > CUT * number:
        yield Sign(
            Verdict.WARNING,
            f"{cut} of {number} answers are cut at --generate_max_len {limit} (median {median} tokens): raise it.",
        )
    else:
        yield Sign(
            Verdict.FINE, f"{cut} of {number} answers are cut at --generate_max_len {limit} (median {median} tokens)."
        )
    empty = sum(not rollout.response_text.strip() for rollout in rollouts)
    if empty > EMPTY * number:
        yield Sign(
            Verdict.STOPS if empty == number >= ENOUGH else Verdict.WARNING,
            f"{empty} of {number} answers have no text, only special tokens or white space: check that prompts end where the "
            "model begins to answer (--apply_chat_template, --input_template).",
        )


def template_signs(
    config: RLConfig, groups: Sequence[ScoredGroup], tokenizer: Tokenizer, stops: Sequence[int]
) -> Iterator[Sign]:
    """Whether text and tokens of prompt and answer belong together as the template and the tokenizer see them."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    yield from _token_signs(config, rollouts, tokenizer, stops)
    if config.apply_chat_template:
        yield from _drift_signs([rollout.response_text for rollout in rollouts], tokenizer)


def _token_signs(
    config: RLConfig, rollouts: Sequence[Rollout], tokenizer: Tokenizer, stops: Sequence[int]
) -> Iterator[Sign]:
    """Whether the text of prompt and answer becomes the same tokens again."""
    merged, other, number = 0, 0, len(rollouts)
    for rollout in rollouts:
        prompt, answer = rollout.prompt.tokens, _without_stop(rollout.response_tokens, stops)
        text = rollout.prompt.text + _continuation(prompt, answer, tokenizer)
        try:
            (again,) = encode([text], tokenizer, add_special_tokens=not config.apply_chat_template)
        except DataError:  # two BOS tokens in a row, by an answer that begins with one
            other += 1
            continue
        merged += tuple(again[: len(prompt)]) != prompt
        other += tuple(again) != prompt + answer
    if merged > DRIFT * number:
        yield Sign(
            Verdict.WARNING,
            f"In {merged} of {number} answers the tokenizer would join the end of the prompt with the start of the answer, so "
            "that the model never saw such a beginning: end the prompt without a space (--input_template).",
        )
    elif other > DRIFT * number:
        yield Sign(
            Verdict.WARNING,
            f"The text of {other} of {number} answers becomes other tokens than were sampled, so that the reward may read what "
            "the model did not mean: sample at a lower --temperature, or check that tokenizer and model belong together.",
        )
    else:
        yield Sign(Verdict.FINE, f"The text of {number - other} of {number} answers becomes the sampled tokens again.")


def drift(answer: str, tokenizer: Tokenizer) -> str:
    """How the chat template departs from its own prompt once the answer is in the conversation, in words; "" if it does not.

    Where the template refuses the answer, or does not show it as it is, nothing can be said.
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


def _drift_signs(answers: Sequence[str], tokenizer: Tokenizer) -> Iterator[Sign]:
    """Template drift."""
    found = [how for how in (drift(answer, tokenizer) for answer in answers) if how]
    if found:
        yield Sign(
            Verdict.WARNING,
            f"In {len(found)} of {len(answers)} conversations with the answer the chat template does not continue its own prompt "
            f"({found[0]}): later turns and supervised rows are not what is trained here; give a --tokenizer_chat_template "
            "that does.",
        )


def _continuation(prompt: Sequence[int], answer: Sequence[int], tokenizer: Tokenizer) -> str:
    """The text of the answer where it stands: some tokenizers drop a space at the start of a text."""
    before, whole = visible(tokenizer, prompt), visible(tokenizer, (*prompt, *answer))
    return whole[len(before) :] if whole.startswith(before) else visible(tokenizer, answer)


def _without_stop(tokens: tuple[int, ...], stops: Sequence[int]) -> tuple[int, ...]:
    return tokens[:-1] if tokens and tokens[-1] in stops else tokens
