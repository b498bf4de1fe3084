"""The fields of a row as prompt and answer, and both as one text to tokenise. Raises RowError for anything else."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from togi.data.chat import Tokenizer, plain_prompt, plain_text, template_text
from togi.data.faults import Drop, Note, of_field
from togi.data.messages import ASSISTANT, TOOL, USER, Dialogue, Message, dialogue_of, frame_of, holds_text
from togi.data.precheck import RecordSpec, missing_field
from togi.data.tables import Row
from togi.data.turns import Draft, check_last, conversation

# A shorter prompt may start an answer by chance.
LONG_PROMPT = 20
MISSING_WORDS = frozenset({"nan", "NaN", "NAN", "None", "null", "NULL", "<NA>", "NaT"})


def is_empty(value: object) -> bool:
    """Whether a value is nothing, only white space, or no messages."""
    return value is None or (isinstance(value, str) and not value.strip()) or value == []


@dataclass(frozen=True, slots=True)
class Fields:
    """One row by its fields. Every method raises RowError, whose message goes after the place of the row (``faults.at``)."""

    row: Row
    tokenizer: Tokenizer

    def value(self, flag: str, key: str) -> object:
        """The value of the field that a flag names. It must be there and not NaN, which tables have for a missing value."""
        if key not in self.row:
            raise missing_field(flag, key, self.row)
        value: object = self.row[key]
        if isinstance(value, float) and math.isnan(value):
            raise Drop.WRONG_TYPE.error(f"the field {key!r} is NaN, a missing value: fill it in or remove the row.")
        return value

    def text(self, key: str, *, chat: bool = True) -> str:
        """The value if it is a string. ``chat``: whether a chat template would accept messages there."""
        with of_field(key):
            return plain_text(self.row[key], chat=chat)

    def prompt(self, key: str) -> Dialogue:
        """The prompt as messages: a string becomes one user message. With the row's tools and system turn."""
        frame = frame_of(self.row)
        with of_field(key):
            return dialogue_of(self.row[key], USER, template_text(self.tokenizer), frame)

    def whole(self, key: str, flag: str) -> Dialogue:
        """A conversation that ends with the answer, for rows without the field of ``flag``."""
        found, value = self.prompt(key), self.row[key]
        if holds_text(value):
            raise Drop.WRONG_TYPE.error(
                f"the field {key!r} is a string, but without --{flag} it must be a list of messages that ends with the "
                f"answer: set --{flag}, or give the list."
            )
        return found

    def exchange(self, keys: tuple[str, str]) -> tuple[Dialogue, int]:
        """The fields of prompt and answer as one conversation, and the number of its messages before the answer."""
        prompt, answer = self.row[keys[0]], self.row[keys[1]]
        question = self.prompt(keys[0])
        with of_field(keys[1]):
            reply = dialogue_of(answer, ASSISTANT, template_text(self.tokenizer), replace(question, messages=()))
            if reply.messages:
                check_last(reply.messages)
        whole, first = joined(question, reply, keys)
        return replace(whole, notes=whole.notes | _missing(prompt, answer) | _repeated(answer, prompt)), first

    def draft(self, keys: tuple[str, str], spec: RecordSpec) -> Draft | Drop:
        """The fields of prompt and answer as a chat or as plain text, in which the answer is trained."""
        if is_empty(self.row[keys[0]]):
            return Drop.EMPTY_PROMPT
        if is_empty(self.row[keys[1]]):
            return Drop.EMPTY_ANSWER
        if spec.apply_chat_template:
            dialogue, first = self.exchange(keys)
            return conversation(dialogue, 0 if spec.multiturn else first, self.tokenizer)
        text, reply = self.text(keys[0]), self.text(keys[1])
        rendered = plain_prompt(text, spec.template)
        return plain_draft(rendered, reply, _missing(text, reply) | _repeated(reply, text, rendered))


def joined(prompt: Dialogue, answer: Dialogue, keys: tuple[str, str]) -> tuple[Dialogue, int]:
    """Prompt and answer as one conversation, and the number of its messages before the answer.

    An answer that is a conversation may begin with the prompt. Then the prompt is used once, in the wording of the answer's field,
    with the system turn of either. ``keys``: the names of the fields. Raises RowError if the two differ.
    """
    # System turns are compared apart: the answer's field may have it, the prompt's, or both.
    prompt_system, asked = prompt.parted()
    answer_system, said = answer.parted()
    system = prompt_system or answer_system
    if prompt_system and answer_system and not _alike(prompt_system, answer_system):
        raise Drop.WRONG_ROLES.error(
            f"the fields {keys[0]!r} and {keys[1]!r} begin with different system turns: leave one of them out."
        )
    # Two turns of the assistant in a row cannot be told apart in training.
    if asked and said and asked[-1]["role"] == said[0]["role"] == ASSISTANT:
        raise Drop.WRONG_ROLES.error(
            f"the prompt in {keys[0]!r} ends with a turn of the assistant, and the answer in {keys[1]!r} would follow "
            "it: end the prompt with the turn that is answered."
        )
    # Does the conversation of the answer repeat the prompt?
    repeats = bool(asked) and _alike(asked, said[: len(asked)])
    if not repeats and asked and said and said[0]["role"] == USER and asked[-1]["role"] in (USER, TOOL):
        raise Drop.WRONG_ROLES.error(
            f"the conversation in {keys[1]!r} does not begin with the prompt in {keys[0]!r}: let both have the same "
            "turns, or give only one of the two fields."
        )
    # The usual case: the answer follows the prompt.
    if not repeats and not answer_system:
        return prompt.extended(answer), len(prompt.messages)
    if not repeats and said[0]["role"] != USER:
        raise Drop.WRONG_ROLES.error(
            f"the field {keys[1]!r} begins with a system turn behind the prompt in {keys[0]!r}: put it at the "
            "beginning of the prompt."
        )
    notes = prompt.notes | answer.notes | {Note.PROMPT_TWICE}
    whole = (*system, *said) if repeats else (*system, *asked, *said)
    return Dialogue(whole, prompt.tools, notes), len(system) + len(asked)


def plain_draft(prompt: str, answer: str, notes: frozenset[Note] = frozenset()) -> Draft:
    """Train on the answer, which follows the formatted prompt with nothing in between."""
    text = prompt + answer
    return Draft(text, ((len(prompt), len(text)),), complete=True, notes=notes)


def _missing(*values: object) -> frozenset[Note]:
    """A note if a text is a word for a missing value, such as "nan". It may be meant, so it is only a note."""
    words = {value.strip() for value in values if isinstance(value, str)}
    return frozenset({Note.MISSING_WORD} if words & MISSING_WORDS else ())


def _repeated(answer: object, *prompts: object) -> frozenset[Note]:
    """A note if the text of an answer begins with that of the whole prompt, and not by chance."""
    texts = (prompt.strip() for prompt in prompts if isinstance(prompt, str))
    starts = tuple(text for text in texts if len(text) >= LONG_PROMPT)
    return frozenset({Note.PROMPT_IN_ANSWER} if isinstance(answer, str) and answer.lstrip().startswith(starts) else ())


def _alike(some: Sequence[Message], others: Sequence[Message]) -> bool:
    """Whether two conversations have the same turns, up to white space."""

    def bare(messages: Sequence[Message]) -> list[tuple[object, ...]]:
        return [(m["role"], "".join(m["content"].split()), m.get("tool_calls")) for m in messages]

    return bare(some) == bare(others)
